"""FP8 x one row of x as one compiled loop over 32-bit words; for this torch.compile and g++ must be there.

Switched on by SGLANG_MIXED_COMPILE=1: the first call compiles for some 20 seconds, a further shape for 2.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import torch

MAX_SHAPES = 64
# A word's bytes are shifted to where they read as float32 of w·2⁻¹²⁰; x carries one part of 2¹²⁰, the result the other.
X_POWER, Y_POWER = 2.0**100, 2.0**20
# GCC turns inductor's bit casts, which are loops, into hundreds of scalar moves unless it may vectorize them whole.
OPTIONS: dict[str, str | int | bool | Callable[..., object]] = {
    "cpp.march": "native -ftree-loop-vectorize -mprefer-vector-width=512"
}


def is_enabled() -> bool:
    """Whether the user asked for compiled kernels."""
    return os.environ.get("SGLANG_MIXED_COMPILE") == "1"


def fp8_gemv(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """e4m3 [out, in] times x float32 [blocks, in], row block i of W meeting row i of x -> float32 [out]."""
    words = weight.view(torch.int32).view(len(x), -1, weight.shape[1] // 4)
    by_byte = x.mul(X_POWER).view(len(x), -1, 4).transpose(1, 2).contiguous()
    return _compiled()(words, by_byte).mul_(Y_POWER)


@functools.cache
def _compiled() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    # One graph for all shapes would divide in its inner loop and take twice as long; a model has a dozen shapes.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_SHAPES)
    return torch.compile(_word_gemv, dynamic=False, options=OPTIONS)


def _word_gemv(words: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """int32 [blocks, rows, in/4] and float32 [blocks, 4, in/4] -> float32 [blocks * rows]."""
    total = torch.zeros(())
    for byte in range(4):
        bits = (words << (24 - 8 * byte) >> 4) & -0x78100000  # sign to bit 31, exponent and mantissa to bits 26..20
        total = total + bits.view(torch.float32) * x[:, None, byte]
    return total.sum(-1).flatten()
