"""Random maps over the tiny checkpoints, and whether engines hold the bytes that `size` predicts for them.

`python -m tests.engine.random_maps 10` tries maps 0 to 9 at TP 1 and 2 and prints one JSON object an engine.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from sglang_mixed.cli.size import describe

from .launch import TINY, Engine, stop_all

SOURCES = ("bf16", "fp8-block", "fp8-channel", "gptq-int4", "int8")
PATTERNS = (
    *("model.layers.*.self_attn.{part}", "model.layers.{layer}.self_attn.{part}", "model.layers.{layer}.self_attn.**"),
    *("**.experts.**", "model.layers.{layer}.mlp.experts.**", "**.experts.{expert}.**", "**.experts.{few}.*_proj"),
    *("model.layers.{layer}.mlp.experts.{expert}.*.weight", "model.layers.{layer}.mlp.experts.{few}.{expert_part}"),
    "model.layers.{layer}.mlp.experts.{expert}.{expert_part}.weight",
)
#: What both sides tell of a rank.
COMPARED = ("weight_bytes", "bf16_bytes", "by_format", "by_module_kind")


def random_map(folder: Path, seed: int) -> Path:
    """A map of 4 to 16 rules, written to the folder."""
    choose = random.Random(seed)
    rules: dict[str, str] = {}
    for _ in range(choose.randint(4, 16)):
        first = choose.randrange(7)
        pattern = choose.choice(PATTERNS).format(
            part=choose.choice(("q_proj", "k_proj", "v_proj", "o_proj")),
            expert_part=choose.choice(("gate_proj", "up_proj", "down_proj")),
            layer=choose.randrange(2),
            expert=choose.randrange(8),
            few=f"{{{first}..{choose.randint(first + 1, 7)}}}",
        )
        rules[pattern] = choose.choice(SOURCES)
    lines = ["mixed_precision:", *(f"  {name}_path: {TINY / name}" for name in SOURCES)]
    lines += [f"  default: {choose.choice(SOURCES)}", "  weight_mapping:"]
    lines += [f'    "{pattern}": {source}' for pattern, source in rules.items()]
    file = folder / f"random-{seed}.yaml"
    file.write_text("\n".join(lines) + "\n")
    return file


def start(log: Path, file: Path, tp: int, *requests: dict[str, Any]) -> Engine:
    """An engine that serves the map on `tp` ranks."""
    mix = {"enable_mixed_precision": True, "mixed_precision_config": str(file), "tp_size": tp}
    return Engine(log, TINY / "bf16", *requests, **mix)


def differences(file: Path, tp: int, memory: dict[str, Any]) -> dict[str, Any]:
    """What an engine's statistics say otherwise than `size`, rank by rank: nothing, if all is well."""
    predicted = describe(file, str(TINY / "bf16"), tp=tp)["ranks"]
    measured = memory.get("tensor_parallel_ranks", [memory])
    assert len(measured) == len(predicted) == tp
    found = {}
    for ours, theirs in zip(predicted, measured, strict=True):
        expected = {**{key: ours[key] for key in COMPARED}, "bytes_read": ours["read_bytes"]}
        found.update(
            {f"{ours['number']} {key}": (one, theirs[key]) for key, one in expected.items() if one != theirs[key]}
        )
    return found


def main(count: int) -> None:
    """Try `count` maps, two engines at a time."""
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for seed in range(count):
                file = random_map(folder, seed)
                engines = {tp: start(folder / f"{seed}-{tp}.log", file, tp) for tp in (1, 2)}
                for tp, engine in engines.items():
                    memory = engine.result()["memory"]
                    report = {"map": seed, "tp": tp, "weight_bytes": memory["weight_bytes"]}
                    print(json.dumps({**report, "different": differences(file, tp, memory)}), flush=True)
    finally:
        stop_all()


if __name__ == "__main__":
    main(int(sys.argv[1]))
