"""What all launches of the Triton kernels have in common."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton.language as tl

from .codec import LARGEST_STEP

#: torch's dtype of activations -> Triton's.
TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def ceil_div(number: int, size: int) -> int:
    """Triton's own is made for kernels: on the host it takes microseconds, of which a layer of few tokens has few."""
    return -(-number // size)


def next_power_of_2(number: int) -> int:
    """The least from `number` on; see `ceil_div`."""
    return 1 << (number - 1).bit_length()


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


class OfParts(NamedTuple):
    """How a product of few rows is cut: its tiles, and a part's least steps."""

    tiles: Tiles
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
    8: Linear(Tiles(8, 64, 2, 3), 5, 3),
    16: Linear(Tiles(16, 64, 2, 3), 4, 4),
    32: Linear(Tiles(32, 64, 4, 3), 4, 4),
    64: Linear(Tiles(32, 64, 4, 3), 5, 5),
    128: Linear(Tiles(64, 64, 4, 3), 4, 16),
    256: Linear(Tiles(64, 64, 4, 3), 8, 16),
}
#: Of few outputs, as a router's, and few rows.
FEW_OUTPUTS = 512
LINEAR_OF_FEW_OUTPUTS = {
    8: Linear(Tiles(8, 16, 1, 3), 2, 1),
    16: Linear(Tiles(16, 16, 4, 3), 2, 2),
    64: Linear(Tiles(32, 16, 4, 3), 2, 2),
}
LINEAR_OF_MORE_ROWS = Linear(Tiles(64, 64, 4, 3), 2, 16)
MULTIPROCESSORS = 132
#: Products of experts for few pairs of tokens and slots: gate and up, each by itself; down by the number of pairs. With
#: more than those each expert's are taken together.
GATE_UP_PARTS = OfParts(Tiles(8, 64, 2, 3), 4)
DOWN_PARTS = {16: OfParts(Tiles(8, 64, 2, 3), 3), 32: OfParts(Tiles(8, 32, 2, 3), 6)}
FEW_PAIRS = max(DOWN_PARTS)
MOST_PARTS = 8
#: Tiles of a linear that is cut along its columns: with more of them it has programs enough without.
MOST_SUMS = max(linear.busy for linear in (*LINEAR.values(), LINEAR_OF_MORE_ROWS)) * MULTIPROCESSORS // 2
#: Of a thread in a program of two warps, at most: a multiprocessor then has room for eleven of these, those of a kernel
#: and of the one that overlaps with it.
FEW_REGISTERS = 88
#: Whether kernels are launched while the one ahead of them still runs, which hides what a launch takes.
OVERLAPS = True


class Cut(NamedTuple):
    """A product's tiles, and into how many parts its columns are cut."""

    tiles: Tiles
    parts: int

    def grid(self, outputs: int, rows: int) -> tuple[int, int, int]:
        """Programs of a product."""
        return ceil_div(outputs, self.tiles.outputs), ceil_div(rows, self.tiles.rows), self.parts

    def grid_of_pairs(self, outputs: int, pairs: int, matrices: int = 1) -> tuple[int, int, int]:
        """Programs of products of which each is of one row, and a matrix."""
        return ceil_div(outputs, self.tiles.outputs), pairs, self.parts * matrices


def cut_experts(hidden: int, intermediate: int, pairs: int, takes_registers: bool) -> tuple[Cut, Cut]:
    """The cuts of gate and up, and of down, for few pairs."""
    down = next(own for most, own in DOWN_PARTS.items() if pairs <= most)
    first, second = (
        Cut(
            _with_registers(own.tiles, takes_registers),
            min(MOST_PARTS, ceil_div(ceil_div(columns, LARGEST_STEP), own.steps)),
        )
        for columns, own in ((hidden, GATE_UP_PARTS), (intermediate, down))
    )
    return first, second


def most_sums(hidden: int, intermediate: int) -> int:
    """Tiles of products for few pairs at most: of gate and up a pair has its own, of down a token."""
    least = min(own.tiles.outputs for own in DOWN_PARTS.values())
    return FEW_PAIRS * max(ceil_div(intermediate, GATE_UP_PARTS.tiles.outputs), ceil_div(hidden, least))


def cut_linear(rows: int, columns: int, outputs: int, takes_registers: bool) -> Cut:
    """The cut of a product of rows and a weight [outputs, columns]: into no more programs than keep a GPU busy."""
    are_few = outputs <= FEW_OUTPUTS and rows <= max(LINEAR_OF_FEW_OUTPUTS) and not takes_registers
    known = LINEAR_OF_FEW_OUTPUTS if are_few else LINEAR
    linear = next((own for most, own in known.items() if rows <= most), LINEAR_OF_MORE_ROWS)
    programs = ceil_div(outputs, linear.tiles.outputs) * ceil_div(rows, linear.tiles.rows)
    steps = ceil_div(columns, LARGEST_STEP)
    own = max(linear.steps, ceil_div(steps, max(1, linear.busy * MULTIPROCESSORS // programs)))
    return Cut(_with_registers(linear.tiles, takes_registers), ceil_div(steps, own))


def _with_registers(tiles: Tiles, takes_registers: bool) -> Tiles:
    """Of few rows, in parts: as many warps as leave a thread registers enough."""
    return tiles._replace(warps=4) if takes_registers and tiles.rows <= 8 else tiles


def tiles_for_experts(pairs: float, takes_registers: bool) -> tuple[Tiles, Tiles]:
    """How the products with gate and up, and with down, are cut, for so many pairs of an expert on average."""
    rows = next((rows for rows, most in PAIRS_OF_PROGRAM.items() if pairs <= most), 64)
    if takes_registers:
        return OF_MANY_REGISTERS[rows], OF_MANY_REGISTERS[rows]
    return GATE_UP[rows], DOWN[rows]


def dot_type(x: torch.Tensor) -> Any:
    """The dtype of products' factors. Triton's interpreter, which alone runs on a CPU, misreads BF16 there."""
    return TYPES[x.dtype] if x.is_cuda else tl.float32


def options(tiles: Tiles, x: torch.Tensor, registers: int | None = None) -> dict[str, Any]:
    """What a product's kernel is told of its tiles, and of the activations; `registers` of two warps that overlap."""
    found = {
        "BLOCK_M": tiles.rows,
        "BLOCK_N": tiles.outputs,
        "DOT": dot_type(x),
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }
    return found | {"maxnreg": registers} if registers and tiles.warps == 2 and overlaps(x) else found


def overlap(x: torch.Tensor) -> dict[str, bool]:
    """How kernels of parts are launched; GPUs have programmatic dependent launches from Hopper on."""
    return {"OVERLAPS": True, "launch_pdl": True} if overlaps(x) else {"OVERLAPS": False}


def overlaps(x: torch.Tensor) -> bool:
    """Whether kernels can be launched ahead of each other's end."""
    return OVERLAPS and x.is_cuda and _capability(x.device) >= (9, 0)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
