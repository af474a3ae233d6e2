"""What all launches of the Triton kernels have in common."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl

#: torch's dtype of activations -> Triton's.
TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


class Tiles(NamedTuple):
    """How a product is cut: rows and outputs of a program, its warps, and the loads in flight."""

    rows: int
    outputs: int
    warps: int
    stages: int


#: For few rows an expert, and for many.
TILES = (Tiles(16, 64, 4, 3), Tiles(64, 128, 8, 3))


def dot_type(x: torch.Tensor) -> Any:
    """The dtype of products' factors. Triton's interpreter, which alone runs on a CPU, misreads BF16 there."""
    return TYPES[x.dtype] if x.is_cuda else tl.float32
