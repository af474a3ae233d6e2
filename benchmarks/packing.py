"""Packing weights for their kernels and restoring them, against copying the same bytes: one thread, GB/s of the file.

Small weights are what MoE checkpoints consist of: there the calls count. Weights are rotated so that none is still in
the cache when its turn comes. No bars: `loading.py` has the one that users feel.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent))
from measure import interleaved, report

from sglang_mixed.formats import ModuleFormat
from sglang_mixed.formats.awq import AWQParameters
from sglang_mixed.formats.fp8 import FP8Parameters
from sglang_mixed.formats.gptq import GPTQParameters
from sglang_mixed.formats.packed import PackedParameters
from sglang_mixed.kernels import chunked, pack

SHAPES = ((512, 1024), (1024, 2048), (4096, 4096))
GROUP = 128
ROTATED_BYTES = 64 << 20
GENERATOR = torch.Generator().manual_seed(0)
Tensors = dict[str, torch.Tensor]
Made = tuple[ModuleFormat, Tensors]


def words(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, generator=GENERATOR)


def gptq(out: int, columns: int, act_order: bool) -> Made:
    g_idx = torch.arange(columns, dtype=torch.int32) // GROUP
    tensors = {
        "qweight": words(columns // 8, out),
        "qzeros": torch.full((columns // GROUP, out // 8), 0x77777777, dtype=torch.int32),
        "scales": torch.rand(columns // GROUP, out, generator=GENERATOR).half(),
        "g_idx": g_idx[torch.randperm(columns, generator=GENERATOR)] if act_order else g_idx,
    }
    parameters = GPTQParameters(4, GROUP, True, act_order, True, 1, "F16")
    return ModuleFormat("gptq", parameters, (out, columns)), tensors


def awq(out: int, columns: int) -> Made:
    groups = columns // GROUP
    scales = torch.rand(groups, out, generator=GENERATOR).half()
    tensors = {"qweight": words(columns, out // 8), "qzeros": words(groups, out // 8), "scales": scales}
    return ModuleFormat("awq", AWQParameters(4, GROUP, "F16"), (out, columns)), tensors


def packed(out: int, columns: int) -> Made:
    tensors = {
        "weight_packed": words(out, columns // 8),
        "weight_scale": torch.rand(out, columns // GROUP, generator=GENERATOR).bfloat16(),
        "weight_shape": torch.tensor([out, columns]),
    }
    parameters = PackedParameters(4, "group", GROUP, True, False, "BF16")
    return ModuleFormat("packed", parameters, (out, columns)), tensors


def fp8(out: int, columns: int) -> Made:
    grid = out // 128, columns // 128
    codes = torch.randint(0, 127, (out, columns), dtype=torch.uint8, generator=GENERATOR)
    tensors = {"weight": codes.view(torch.float8_e4m3fn), "scale": torch.rand(grid, generator=GENERATOR)}
    return ModuleFormat("fp8", FP8Parameters("block", (128, 128), "scale", "F32", grid), (out, columns)), tensors


FORMATS: dict[str, Callable[[int, int], Made]] = {
    "GPTQ int4": lambda out, columns: gptq(out, columns, False),
    "GPTQ int4 act-order": lambda out, columns: gptq(out, columns, True),
    "AWQ int4": awq,
    "CT int4": packed,
    "FP8 128x128": fp8,
}


def measure(label: str, shape: tuple[int, int], repeats: int) -> None:
    format, tensors = FORMATS[label](*shape)
    size = sum(tensor.nbytes for tensor in tensors.values())
    copies = max(2, ROTATED_BYTES // size)
    weights = [{name: one.clone() for name, one in tensors.items()} for _ in range(copies)]
    packed_weights = [pack(one, format) for one in weights]

    def restore(turn: int) -> object:
        kernel, resident = packed_weights[turn % copies]
        return kernel.unpack(resident, format)

    runs: dict[str, Callable[[int], object]] = {
        "pack": lambda turn: pack(weights[turn % copies], format),
        "restore": restore,
        "copy": lambda turn: [one.clone() for one in weights[turn % copies].values()],
    }
    times = interleaved(runs, max(repeats, copies), time.thread_time)
    for way in ("pack", "restore"):
        name = f"{way} {label} {shape[0]}x{shape[1]}"
        baseline = f"copy, {size / times['copy'].minimum / 1e9:.1f} GB/s"
        report(name, size / times[way].minimum / 1e9, "GB/s", baseline, None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=24)
    options = parser.parse_args()
    torch.set_num_threads(1)
    chunked.SMALL_VALUES = 0  # small weights keep the file's layout otherwise
    for shape in SHAPES:
        for label in FORMATS:
            measure(label, shape, options.repeats)
    return 0


if __name__ == "__main__":
    sys.exit(main())
