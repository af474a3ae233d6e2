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


class Linear(NamedTuple):
    """How a linear is cut: its tiles, the programs that a multiprocessor gets at most, a part's least steps.

    What a program does before and after its steps takes as long as some of them.
    """

    tiles: Tiles
    busy: int
    steps: int


#: Of products with experts' gate and up, outputs of both together, and with down: by the rows of a program, the fastest
#: on an H200 for FP8, Int4 and a mix of both.
GATE_UP = {8: Tiles(8, 128, 4, 3), 16: Tiles(16, 128, 4, 3), 64: Tiles(64, 128, 4, 3)}
DOWN = {8: Tiles(8, 64, 2, 3), 16: Tiles(16, 128, 4, 3), 64: Tiles(64, 128, 4, 3)}
#: Of both, where a thread would run out of registers.
OF_MANY_REGISTERS = {8: Tiles(8, 64, 4, 3), 16: Tiles(16, 64, 4, 3), 64: Tiles(64, 128, 8, 3)}
#: Pairs of an expert on average, up to which a program has so many rows.
PAIRS_OF_PROGRAM = {8: 8, 16: 16}
#: By rows, and for more of them; on an H200, against Marlin.
LINEAR = {
    8: Linear(Tiles(8, 64, 2, 3), 8, 2),
    16: Linear(Tiles(16, 64, 2, 3), 8, 2),
    32: Linear(Tiles(32, 64, 4, 4), 4, 2),
    64: Linear(Tiles(32, 64, 4, 4), 4, 8),
    128: Linear(Tiles(64, 64, 4, 4), 2, 8),
}
LINEAR_OF_MORE_ROWS = Linear(Tiles(64, 128, 8, 3), 2, 4)
MULTIPROCESSORS = 132
#: Products of experts that are cut along their columns: gate and up, each by itself; down; the steps of a part of each.
GATE_UP_PARTS, DOWN_PARTS, EXPERTS_STEPS = Tiles(8, 64, 2, 3), Tiles(8, 32, 2, 3), (4, 3)
MOST_PARTS = 8
#: Outputs of a program that adds parts.
SUMMED_AT_ONCE = 64
#: Whether kernels are launched while the one ahead of them still runs, which hides what a launch takes.
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


def cut_experts(hidden: int, intermediate: int) -> tuple[Cut, Cut]:
    """The cuts of gate and up, and of down, for few pairs."""
    first, second = (
        min(MOST_PARTS, triton.cdiv(triton.cdiv(columns, LARGEST_STEP), steps))
        for columns, steps in zip((hidden, intermediate), EXPERTS_STEPS, strict=True)
    )
    return Cut(GATE_UP_PARTS, first), Cut(DOWN_PARTS, second)


def cut_linear(rows: int, columns: int, outputs: int) -> Cut:
    """The cut of a product of rows and a weight [outputs, columns]: into no more programs than keep a GPU busy."""
    linear = next((own for most, own in LINEAR.items() if rows <= most), LINEAR_OF_MORE_ROWS)
    programs = triton.cdiv(outputs, linear.tiles.outputs) * triton.cdiv(rows, linear.tiles.rows)
    steps = triton.cdiv(columns, LARGEST_STEP)
    own = max(linear.steps, triton.cdiv(steps, max(1, linear.busy * MULTIPROCESSORS // programs)))
    return Cut(linear.tiles, triton.cdiv(steps, own))


def tiles_for_experts(gate_up: Sequence[Codec], down: Sequence[Codec], pairs: float) -> tuple[Tiles, Tiles]:
    """How the products with gate and up, and with down, are cut, for so many pairs of an expert on average."""
    rows = next((rows for rows, most in PAIRS_OF_PROGRAM.items() if pairs <= most), 64)
    if any(codec.takes_registers for codec in (*gate_up, *down)):
        return OF_MANY_REGISTERS[rows], OF_MANY_REGISTERS[rows]
    return GATE_UP[rows], DOWN[rows]


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
