"""On a GPU, in one call: single layers against float64, then mixed models served by SGLang against stock SGLang.

    python scripts/gpu/check.py [--seconds 460] [--only NAME ...] [--together 5]

Prints one JSON object a check, and a last one that counts. A check that fails, or that no time is left for, says so and
stops no other. Two GPUs: also TP 2 and EP 2. CUDA graphs are on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from compare import ROOT, report, shortened, start

sys.path.insert(0, str(ROOT))
from tests.engine.family_models import Pack, write_family
from tests.engine.launch import TINY
from tests.engine.mixes import SOURCES as PACKERS
from tests.engine.mixes import write_mix
from tests.engine.reference import write_reference
from tests.formats import packers

from sglang_mixed import make_plan

#: Bounds of the largest and the mean difference. FP8 and INT8 kernels quantize activations, the reference does not.
AS_STOCK, AS_DEQUANTIZED = (0.02, 0.001), (2.0, 0.06)
SOURCES = ("bf16", "fp8-block", "fp8-channel", "gptq-int4", "int8")
EXPERTS, ATTENTION = "model.layers.{layers}.mlp.experts.{experts}.*", "model.layers.{layers}.self_attn.{parts}_proj"


def experts(layers: str, numbers: str) -> str:
    return EXPERTS.replace("{layers}", layers).replace("{experts}", numbers)


def attention(layers: str, parts: str) -> str:
    return ATTENTION.replace("{layers}", layers).replace("{parts}", parts)


def uniform(source: str) -> dict[str, str]:
    return {experts("*", "*"): source, attention("*", "*"): source}


THREE = {
    experts("0", "{0..3}"): "fp8-block",
    experts("0", "{4..6}"): "gptq-int4",
    experts("0", "7"): "int8",
    experts("1", "{0,2,4,6}"): "gptq-int4",
    attention("0", "{q,k,v}"): "fp8-channel",
    attention("1", "q"): "gptq-int4",
    attention("1", "k"): "int8",
}


@dataclass(frozen=True)
class Case:
    """A map over the tiny checkpoints (or another model's, written when it is asked for) and engine arguments.

    `stock`: compare with stock SGLang on this very source, not on dequantized weights.
    """

    name: str
    mapping: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    stock: str | None = None
    write: Callable[[Path], Path] | None = None

    def map(self, folder: Path) -> Path:
        """The map's file."""
        folder.mkdir(parents=True, exist_ok=True)
        return self.write(folder) if self.write else write_map(folder, {s: TINY / s for s in SOURCES}, self.mapping)


def write_map(folder: Path, sources: dict[str, Path], mapping: dict[str, str]) -> Path:
    used = {"bf16": sources["bf16"], **{source: sources[source] for source in mapping.values()}}
    lines = ["mixed_precision:", *(f"  {source.replace('-', '_')}_path: {path}" for source, path in used.items())]
    lines += ["  default: bf16", f"  weight_mapping:{'' if mapping else ' {}'}"]
    lines += [f'    "{pattern}": {source.replace("-", "_")}' for pattern, source in mapping.items()]
    path = folder / "map.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


def write_dense(folder: Path) -> Path:
    """A dense Qwen3 of random weights: q/k/v and gate/up split, a static FP8 weight, packed integers."""
    block = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    writers: dict[str, tuple[Pack, float]] = {
        "bf16": PACKERS["bf16"],
        "int8": PACKERS["int8"],
        "fp8-tensor": PACKERS["fp8_tensor"],
        "gptq-8": PACKERS["v2_8bit"],
        "packed": (lambda rng, *shape: packers.packed(rng, *shape, group=64, sym=False), 0.3),
        "fp8-block": (
            lambda rng, out, columns: packers.eight_bit(
                rng, (out, columns), (128, 128), (-(-out // 128), -(-columns // 128)), block, name="weight_scale_inv"
            ),
            1e-3,
        ),
    }
    sources = {name: write_family(folder / name, "qwen3", pack, factor) for name, (pack, factor) in writers.items()}
    layer = "model.layers.{layer}.{matrix}_proj"
    mapping = {
        ("0", "self_attn.q"): "fp8-tensor",
        ("0", "self_attn.k"): "int8",
        ("0", "mlp.gate"): "gptq-8",
        ("0", "mlp.up"): "int8",
        ("1", "self_attn.q"): "packed",
        ("1", "mlp.gate"): "fp8-block",
        ("1", "mlp.up"): "packed",
    }
    named = {layer.replace("{layer}", one).replace("{matrix}", two): to for (one, two), to in mapping.items()}
    return write_map(folder, sources, named)


CASES = [
    Case("three formats, split qkv", THREE),
    Case("one expert alone in its format", {experts("0", "5"): "gptq-int4", experts("1", "0"): "fp8-block"}),
    Case("an expert of each", {experts("*", str(n)): SOURCES[n % 5] for n in range(8)}),
    Case("dense, split qkv and gate/up", write=write_dense),
    # SGLang has no rotary kernel for the heads of the other tiny families.
    Case(
        "dense matrices in ten formats in turns", write=lambda folder: write_mix(folder, "qwen3", "everything differs")
    ),
    Case("uniform gptq", uniform("gptq-int4")),
    Case("uniform fp8 blocks, as stock", uniform("fp8-block"), stock="fp8-block"),
    # Stock SGLang 0.5.17 has no INT8 experts for compressed-tensors, and compiles Marlin for minutes for its GPTQ.
    Case("uniform int8", uniform("int8")),
    Case("uniform fp8 channel, as stock", uniform("fp8-channel"), stock="fp8-channel"),
    Case("uniform bf16, as stock", {}, stock="bf16"),
]
#: NCCL adds up: SGLang's own all-reduce kernels are compiled for minutes at their first start.
TWO_RANKS = {"tp_size": 2, "disable_custom_all_reduce": True, "enforce_disable_flashinfer_allreduce_fusion": True}
TWO_GPUS = [
    Case("three formats, tp 2", THREE, TWO_RANKS),
    Case("three formats, tp 2 ep 2", THREE, {**TWO_RANKS, "ep_size": 2}),
    Case("uniform gptq, tp 2 ep 2", uniform("gptq-int4"), {**TWO_RANKS, "ep_size": 2}),
]


class Checks:
    """Runs cases side by side until a deadline, and counts."""

    def __init__(self, seconds: float, together: int) -> None:
        self._deadline, self._together = time.monotonic() + seconds, together
        self._printing = threading.Lock()
        self.counts = {"good": 0, "bad": 0, "errors": 0, "skipped": 0}

    @property
    def left(self) -> float:
        return self._deadline - time.monotonic()

    def print(self, line: dict[str, Any], good: bool | None = None) -> None:
        """One line; `good` is None where the line says by itself that there was an error, or no time."""
        kind = "errors" if "error" in line else "skipped" if "skipped" in line else "good" if good else "bad"
        with self._printing:
            self.counts[kind] += 1
            print(json.dumps(line), flush=True)

    def layers(self) -> None:
        """The single layers, in a process of their own."""
        command = [sys.executable, str(Path(__file__).parent / "layers.py")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            watch = threading.Timer(max(1, self.left), process.kill)
            watch.start()
            assert process.stdout is not None
            other: list[str] = []
            for text in process.stdout:
                if text.startswith('{"check"'):
                    line = json.loads(text)
                    self.print(line, line.get("ok"))
                else:
                    other.append(text)
            watch.cancel()
        if process.returncode:
            self.print({"check": "single layers", "error": shortened("".join(other))})

    def engines(self, cases: list[Case], folder: Path) -> None:
        """Each case's two engines at once, some cases at once."""
        with ThreadPoolExecutor(self._together) as pool:
            list(
                pool.map(
                    lambda case: self._engines(case, folder / case.name.replace(" ", "-").replace("/", "-")), cases
                )
            )

    def _engines(self, case: Case, folder: Path) -> None:
        line: dict[str, Any] = {"check": case.name}
        if self.left < 45:
            self.print({**line, "skipped": "no time left"})
            return
        began = time.monotonic()
        try:
            path = case.map(folder)
            plan = make_plan(path)
            other = TINY / case.stock if case.stock else write_reference(plan, folder / "reference")
            base = plan.sources[plan.base]
            reference = start(folder, other, None, base)
            mixed = start(folder, base, path, base, **case.arguments)
            try:
                ours = mixed.result(max(1, self.left))
            finally:
                theirs = reference.result(max(1, self.left))
            line |= report(ours, theirs)
            largest, mean = AS_STOCK if case.stock else AS_DEQUANTIZED
            close = line["largest_difference"] <= largest and line["mean_difference"] <= mean
            self.print({**line, "seconds": round(time.monotonic() - began)}, close and line["held_is_planned"])
        except Exception as error:
            self.print({**line, "error": f"{type(error).__name__}: {shortened(str(error))}"})


def chosen(only: list[str]) -> Iterator[Case]:
    cases = [*TWO_GPUS, *CASES] if torch.cuda.device_count() > 1 else CASES
    return (case for case in cases if not only or any(word in case.name for word in only))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=460)
    parser.add_argument("--together", type=int, default=5, help="Cases, of two engines each, at the same time.")
    parser.add_argument("--only", nargs="*", default=[], help="Words of the names of engine checks.")
    parser.add_argument("--no-layers", action="store_true")
    parser.add_argument("--no-engines", action="store_true")
    arguments = parser.parse_args()
    # DeepGEMM would compile for minutes; SGLang's other FP8 kernels do the same.
    os.environ.setdefault("SGLANG_ENABLE_JIT_DEEPGEMM", "0")
    # Of two GPUs one has the reference beside a rank.
    os.environ.setdefault("SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK", "0")
    np.random.seed(0)
    checks = Checks(arguments.seconds, arguments.together)
    with tempfile.TemporaryDirectory() as folder:
        layers = threading.Thread(target=checks.layers)
        if not arguments.no_layers:
            layers.start()
        if not arguments.no_engines:
            checks.engines(list(chosen(arguments.only)), Path(folder))
        if not arguments.no_layers:
            layers.join()
    print(json.dumps({"check": "all", **checks.counts}), flush=True)
    sys.exit(bool(checks.counts["bad"] or checks.counts["errors"]))


if __name__ == "__main__":
    main()
