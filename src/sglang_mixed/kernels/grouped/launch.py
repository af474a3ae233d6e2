"""What all launches of the Triton kernels have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .codec import LARGEST_STEP, Codec

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

#: Of few rows of experts on an H200, where registers are not scarce: gate and up together, and down.
GATE_UP_FEW_ROWS, DOWN_FEW_ROWS = Tiles(16, 128, 4, 3), Tiles(16, 64, 2, 2)
#: Products cut along their columns, the fastest on an H200: gate and up, each by itself; down; linears of few rows.
GATE_UP_PARTS, DOWN_PARTS, LINEAR_PARTS = Tiles(16, 64, 4, 3), Tiles(16, 32, 2, 3), Tiles(16, 64, 4, 4)
#: Steps of a part of gate and up, and of down: for one token's few pairs, and for more.
ONE_TOKENS_PAIRS, ONE_TOKENS_STEPS, MORE_TOKENS_STEPS = 8, (8, 3), (4, 3)
MOST_PARTS = 8
#: Programs that fill a GPU: four for each multiprocessor of an H100 or H200.
ENOUGH_PROGRAMS = 4 * 132
#: Steps of a part of a linear layer at least: what a program does before and after them takes as long as one.
LEAST_STEPS = 2
#: Outputs of a program that adds parts.
SUMMED_AT_ONCE = 64
#: Whether kernels of parts are launched while the one ahead of them still runs, which hides what a launch takes.
OVERLAPS = True


class Cut(NamedTuple):
    """A product's tiles, and into how many parts its columns are cut."""

    tiles: Tiles
    parts: int

    def grid(self, outputs: int, rows: int) -> tuple[int, int, int]:
        """Programs of a product."""
        return triton.cdiv(outputs, self.tiles.outputs), triton.cdiv(rows, self.tiles.rows), self.parts

    def grid_of_pairs(self, outputs: int, pairs: int, matrices: int = 1) -> tuple[int, int, int]:
        """Programs of products of which each is of one row, and a matrix."""
        return triton.cdiv(outputs, self.tiles.outputs), pairs, self.parts * matrices


def cut_experts(hidden: int, intermediate: int, num_pairs: int) -> tuple[Cut, Cut]:
    """The cuts of gate and up, and of down, for so few pairs."""
    own = ONE_TOKENS_STEPS if num_pairs <= ONE_TOKENS_PAIRS else MORE_TOKENS_STEPS
    first, second = (
        min(MOST_PARTS, triton.cdiv(triton.cdiv(columns, LARGEST_STEP), steps))
        for columns, steps in zip((hidden, intermediate), own, strict=True)
    )
    return Cut(GATE_UP_PARTS, first), Cut(DOWN_PARTS, second)


def cut_linear(codec: Codec, rows: int, columns: int, outputs: int) -> Cut:
    """The cut of a product of rows and a weight [outputs, columns]: into no more programs than fill a GPU."""
    tiles = LINEAR_PARTS if rows <= LINEAR_PARTS.rows else tiles_for([codec], rows > 32)
    steps = triton.cdiv(columns, LARGEST_STEP)
    programs = triton.cdiv(outputs, tiles.outputs) * triton.cdiv(rows, tiles.rows)
    return Cut(tiles, triton.cdiv(steps, max(LEAST_STEPS, steps * programs // ENOUGH_PROGRAMS)))


def tiles_for_experts(gate_up: Sequence[Codec], down: Sequence[Codec], has_many_rows: bool) -> tuple[Tiles, Tiles]:
    """How the products with gate and up, and with down, are cut."""
    if has_many_rows or any(codec.takes_registers for codec in (*gate_up, *down)):
        tiles = tiles_for([*gate_up, *down], has_many_rows)
        return tiles, tiles
    return GATE_UP_FEW_ROWS, DOWN_FEW_ROWS


def tiles_for(codecs: Sequence[Codec], has_many_rows: bool) -> Tiles:
    """How a product with weights of these codecs is cut."""
    if not has_many_rows:
        return FEW_ROWS
    return MANY_ROWS_OF_MANY_REGISTERS if any(codec.takes_registers for codec in codecs) else MANY_ROWS


def dot_type(x: torch.Tensor) -> Any:
    """The dtype of products' factors. Triton's interpreter, which alone runs on a CPU, misreads BF16 there."""
    return TYPES[x.dtype] if x.is_cuda else tl.float32


def options(tiles: Tiles, x: torch.Tensor) -> dict[str, Any]:
    """What a product's kernel is told of its tiles, and of the activations."""
    return {
        "BLOCK_M": tiles.rows,
        "BLOCK_N": tiles.outputs,
        "DOT": dot_type(x),
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def overlap(x: torch.Tensor) -> dict[str, bool]:
    """How kernels of parts are launched; GPUs have programmatic dependent launches from Hopper on."""
    if OVERLAPS and x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0):
        return {"OVERLAPS": True, "launch_pdl": True}
    return {"OVERLAPS": False}
