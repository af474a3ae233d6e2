"""What all launches of the Triton kernels have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl

from .codec import Codec

#: torch's dtype of activations -> Triton's.
TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


class Tiles(NamedTuple):
    """How a product is cut: rows and outputs of a program, its warps, and the loads in flight."""

    rows: int
    outputs: int
    warps: int
    stages: int


#: The fastest on an H100 for FP8, Int4 and a mix of both: for few rows a weight and for many.
FEW_ROWS, MANY_ROWS = Tiles(16, 64, 4, 3), Tiles(64, 128, 4, 3)
#: A thread of fewer warps would run out of registers.
MANY_ROWS_OF_MANY_REGISTERS = Tiles(64, 128, 8, 3)


def tiles_for(codecs: Sequence[Codec], has_many_rows: bool) -> Tiles:
    """How a product with weights of these codecs is cut."""
    if not has_many_rows:
        return FEW_ROWS
    return MANY_ROWS_OF_MANY_REGISTERS if any(codec.takes_registers for codec in codecs) else MANY_ROWS


def dot_type(x: torch.Tensor) -> Any:
    """The dtype of products' factors. Triton's interpreter, which alone runs on a CPU, misreads BF16 there."""
    return TYPES[x.dtype] if x.is_cuda else tl.float32
