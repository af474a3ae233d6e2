"""Compressed linear layers on a CPU against bf16 F.linear: time of 4096x4096 at 1, 8 and 128 rows, each format.

"native" is with the products that a C compiler made, "eager" with torch's alone (SGLANG_MIXED_NATIVE=0).

Weights are rotated so that none is still in the cache when its turn comes. Exits with 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.append(str(Path(__file__).parent))
from measure import interleaved, report

from sglang_mixed.formats import ModuleFormat
from sglang_mixed.formats.fp8 import FP8Parameters
from sglang_mixed.formats.gptq import GPTQParameters
from sglang_mixed.formats.int8 import Int8Parameters
from sglang_mixed.kernels import pack
from sglang_mixed.kernels.compiled import available

SIZE = 4096
GENERATOR = torch.Generator().manual_seed(0)
Tensors = dict[str, torch.Tensor]


def integers(low: int, high: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(low, high, shape, dtype=dtype, generator=GENERATOR)


def gptq(symmetric: bool) -> tuple[ModuleFormat, Tensors]:
    groups = SIZE // 128
    words = integers(-(2**31), 2**31, SIZE // 8, SIZE, dtype=torch.int32)
    zeros = torch.full((groups, SIZE // 8), 0x77777777, dtype=torch.int32) if symmetric else words[:groups, ::8]
    tensors = {"qweight": words, "qzeros": zeros, "scales": torch.rand(groups, SIZE, generator=GENERATOR).half()}
    parameters = GPTQParameters(4, 128, symmetric, False, False, 1, "F16")
    return ModuleFormat("gptq", parameters, (SIZE, SIZE)), tensors


def fp8(granularity: str) -> tuple[ModuleFormat, Tensors]:
    block = (128, 128) if granularity == "block" else None
    shape = {"tensor": (1,), "channel": (SIZE, 1), "block": (SIZE // 128, SIZE // 128)}[granularity]
    # As a quantizer leaves them: the largest of some thousand normal values is 448, hardly one is subnormal.
    weight = (torch.randn(SIZE, SIZE, generator=GENERATOR) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    parameters = FP8Parameters(granularity, block, "scale", "F32", shape)
    tensors = {"weight": weight, "scale": torch.rand(shape, generator=GENERATOR)}
    return ModuleFormat("fp8", parameters, (SIZE, SIZE)), tensors


def int8() -> tuple[ModuleFormat, Tensors]:
    weight = integers(-127, 128, SIZE, SIZE, dtype=torch.int8)
    parameters = Int8Parameters("channel", "scale", "F32", (SIZE, 1))
    return ModuleFormat("int8", parameters, (SIZE, SIZE)), {
        "weight": weight,
        "scale": torch.rand(SIZE, 1, generator=GENERATOR),
    }


#: label -> what makes it
FORMATS: dict[str, Callable[[], tuple[ModuleFormat, Tensors]]] = {
    "GPTQ int4 g128": functools.partial(gptq, True),
    "GPTQ int4 g128 asym": functools.partial(gptq, False),
    "INT8 channel": int8,
    "FP8 channel": functools.partial(fp8, "channel"),
    "FP8 tensor": functools.partial(fp8, "tensor"),
    "FP8 128x128": functools.partial(fp8, "block"),
}
#: Bars by first word of the label and rows: of the compiled products, and of torch's where there is no C compiler.
BARS = {
    "native": {("GPTQ", 1): 0.35, ("INT8", 1): 0.5, ("FP8", 1): 0.7, ("GPTQ", 8): 1.0, ("INT8", 8): 1.0},
    "eager": {("FP8", 1): 2.0},
}
MANY_ROWS_BAR = 2.5


def bar(way: str, label: str, rows: int) -> float | None:
    return BARS[way].get((label.split()[0], rows), MANY_ROWS_BAR if way == "native" and rows == 128 else None)


def rotated(label: str, copies: int) -> Callable[[str, int, torch.Tensor], torch.Tensor]:
    """The format's linear over `copies` weights in turn, in one of the ways."""
    format, tensors = FORMATS[label]()
    kernel, resident = pack(tensors, format)
    weights = [resident] + [{name: one.clone() for name, one in resident.items()} for _ in range(copies - 1)]

    def run(way: str, turn: int, x: torch.Tensor) -> torch.Tensor:
        os.environ["SGLANG_MIXED_NATIVE"] = "01"[way == "native"]
        return kernel.linear(x, weights[turn % copies], format)

    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer weights and repeats, one thread")
    options = parser.parse_args()
    ways = ["native", "eager"] if available() else ["eager"]
    copies, repeats = (6, 12) if options.quick else (16, 48)
    bf16 = [torch.randn(SIZE, SIZE, generator=GENERATOR).bfloat16()]
    bf16 += [bf16[0].clone() for _ in range(copies - 1)]
    linears = {label: rotated(label, copies) for label in FORMATS}
    met = True
    for threads in (1,) if options.quick else (1, 2):
        torch.set_num_threads(threads)
        clock = time.thread_time if threads == 1 else time.perf_counter
        for rows in (1, 8, 128):
            x = torch.randn(rows, SIZE, generator=GENERATOR).bfloat16()
            runs: dict[str, Callable[[int], object]] = {"bf16": lambda turn, x=x: F.linear(x, bf16[turn % copies])}
            for way, (label, run) in itertools.product(ways, linears.items()):
                runs[f"{label} {way}"] = lambda turn, x=x, way=way, run=run: run(way, turn, x)
            times = interleaved(runs, repeats // 3 if rows == 128 else repeats, clock)
            report(f"bf16 {rows} rows {threads} threads", times["bf16"].minimum * 1e3, "ms", "", None)
            for way, label in itertools.product(ways, FORMATS):
                ratio = times[f"{label} {way}"].minimum / times["bf16"].minimum
                name = f"{label} {way} {rows} rows {threads} threads"
                met &= report(name, ratio, "x", "bf16 F.linear", bar(way, label, rows) if threads == 1 else None)
    return not met


if __name__ == "__main__":
    sys.exit(main())
