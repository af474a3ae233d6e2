"""On a GPU: serve maps on SGLang and compare with stock SGLang on the same weights dequantized to BF16.

    python scripts/gpu/compare.py examples/tiny/map.yaml [MORE.yaml ...]

Prints one JSON object a map: the differences of prompt log-probabilities, greedy tokens that differ, and the proof's
figures. Every engine runs in a process of its own.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.engine.comparison import REQUEST, differing_tokens, largest_difference, mean_difference  # noqa: E402
from tests.engine.launch import Engine  # noqa: E402
from tests.engine.reference import prompts_for, write_reference  # noqa: E402

from sglang_mixed import make_plan  # noqa: E402

#: No kernel but the ones at issue is compiled at the start; logits as exact as they can be.
GPU: dict[str, Any] = {
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "cuda_graph_backend_prefill": "disabled",
    "cuda_graph_max_bs_decode": 32,
    "enable_fp32_lm_head": True,
    "skip_tokenizer_init": True,
}
FIGURES = ("weight_bytes", "planned_bytes", "padding_bytes", "bf16_bytes", "bytes_read", "load_seconds", "verification")
TELLING = re.compile(r"Error|error:|rule:|remedy:|tensor:|assert|Traceback|not supported", re.IGNORECASE)


def start(folder: Path, model: Path, path: Path | None, base: Path, **arguments: Any) -> Engine:
    """An engine that serves a map over `model`, or `model` itself, and answers the usual prompts of the base."""
    folder.mkdir(parents=True, exist_ok=True)
    mixed = {"enable_mixed_precision": True, "mixed_precision_config": str(path)} if path else {}
    request = {"input_ids": prompts_for(base), **REQUEST}
    return Engine(folder / f"{'mixed' if path else 'stock'}.log", model, request, **GPU, **mixed, **arguments)


def report(mixed: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """What two engines' results say."""
    answers, memory = (mixed["answers"][0], reference["answers"][0]), mixed["memory"]
    ranks = memory.get("tensor_parallel_ranks", [memory])
    exact = all(rank["weight_bytes"] == rank["planned_bytes"] for rank in ranks)
    return {
        "largest_difference": largest_difference(*answers),
        "mean_difference": mean_difference(*answers),
        "differing_tokens": differing_tokens(*answers),
        "held_is_planned": exact,
        **{key: [rank[key] for rank in ranks] if len(ranks) > 1 else memory[key] for key in FIGURES},
    }


def shortened(log: str) -> str:
    """The lines of an engine's log that tell why it ended."""
    lines = [line.strip() for line in log.splitlines() if TELLING.search(line)]
    return "\n".join(dict.fromkeys(lines[-40:]))[-2500:] or log[-1500:]


def compare(path: Path) -> dict[str, Any]:
    """One map, both engines at once."""
    plan = make_plan(path)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = plan.sources[plan.base]
        reference = start(folder, write_reference(plan, folder / "reference"), None, base)
        mixed = start(folder, base, path, base)
        return report(mixed.result(), reference.result())


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        line: dict[str, Any] = {"map": argument}
        try:
            line |= compare(Path(argument))
        except AssertionError as error:
            line["error"] = shortened(str(error))
        print(json.dumps(line), flush=True)
