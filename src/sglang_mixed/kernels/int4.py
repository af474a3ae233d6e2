"""Weights of four bits on torch's int4pack kernel, which computes W = (q - 8)·scale + zero in groups along `in`.

At rest: the nibbles in the order that torch's kernel wants on this CPU, scales in the file's dtype, zero points still
packed, and for act-order the permutation that sorts columns by their group. What a call needs besides is derived in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from ..formats import ModuleFormat
from ..formats.base import TORCH_DTYPES
from ..formats.bit_stream import unpack
from . import native
from .base import Conversion, Layout, Tensors, aligned, owned
from .four_bits import BITS, FourBits, four_bits
from .implied import implied, without_implied
from .nibbles import TILE, layout_is_known, pack_words, rows_of_halves, signed_halves, tiles, unpack_words
from .panels import PANEL_BYTES, compute_dtype, spans
from .permutation import inverse, sorting

#: torch's kernel knows groups of 32, 64, 128 and 256 columns.
LARGEST_GROUP = 256
#: From here on decoding to panels beats torch's kernel, which decodes W again for every four rows of x.
MANY_ROWS = 40


class Int4:
    """GPTQ v1 and v2, AWQ, packed integers: 4 bits, symmetric or not, with or without act-order."""

    name = "int4"
    takes_bias = False

    def takes(self, format: ModuleFormat) -> bool:
        """4 bits, whole groups of a multiple of 32 columns, rows a multiple of 16."""
        return four_bits(format) is not None

    def layout(self, format: ModuleFormat) -> Layout:
        """Nibbles [out, in/2], scales [groups, out], then packed zeros and permutation where the format has them."""
        bits, (rows, columns) = _view(format), format.shape
        groups = columns // bits.group_size
        layout: Layout = {
            "nibbles": (torch.uint8, (rows, columns // 2)),
            "scales": (TORCH_DTYPES[bits.scale_dtype], (groups, rows)),
        }
        if bits.zeros:
            layout["zeros"] = (torch.int32, (groups, rows // 8))
        if bits.g_idx:
            layout["permutation"] = (torch.int32, (columns,))
        return layout

    def converts(self, format: ModuleFormat) -> Conversion | None:
        """The words to nibbles, where no act-order decides their places."""
        bits = _view(format)
        return None if bits.g_idx else Conversion(bits.codes, "nibbles", TILE, _convert)

    def pack(self, tensors: Mapping[str, torch.Tensor], format: ModuleFormat) -> Tensors:
        """Reorder the nibbles; what the parameters imply is checked, then left out."""
        kept, bits, place = without_implied(tensors, format), _view(format), None
        resident: Tensors = {}
        if bits.g_idx:
            resident["permutation"] = sorting(kept[bits.g_idx], bits.group_size, bits.g_idx)
            place = inverse(resident["permutation"])
        if "nibbles" in kept:
            resident["nibbles"] = kept["nibbles"]
        else:
            resident["nibbles"] = torch.empty(format.shape[0], format.shape[1] // 2, dtype=torch.uint8)
            pack_words(kept[bits.codes], bits.order, resident["nibbles"], place)
        resident["scales"] = owned(bits.scales_of(kept))
        if (zeros := bits.zeros_of(kept)) is not None:
            resident["zeros"] = owned(zeros)
        return resident

    def unpack(self, resident: Mapping[str, torch.Tensor], format: ModuleFormat) -> Tensors:
        """Nibbles back to the format's words; what was left out is rebuilt from the parameters."""
        bits, place = _view(format), None
        tensors = {**bits.stored(resident["scales"], resident.get("zeros")), **implied(format)}
        if bits.g_idx:
            place = inverse(resident["permutation"])
            tensors[bits.g_idx] = place // bits.group_size
        tensors[bits.codes] = unpack_words(resident["nibbles"], bits.order, place)
        return tensors

    def linear(self, x: torch.Tensor, resident: Mapping[str, torch.Tensor], format: ModuleFormat) -> torch.Tensor:
        """Compiled; else few bf16 rows: torch's kernel; more rows or another dtype: panels."""
        # GPTQ's v1 stores zero points less 1.
        offset: int = getattr(format.parameters, "zero_offset", 0)
        if "permutation" in resident:
            x = x.index_select(1, resident["permutation"])
        if layout_is_known() and native.takes(x):
            return native.Nibbles(resident["nibbles"], resident["scales"], resident.get("zeros"), offset).linear(x)
        if layout_is_known() and (x.dtype != torch.bfloat16 or x.shape[0] >= MANY_ROWS):
            return _by_panels(x, resident, offset)
        return _by_op(x.to(torch.bfloat16), resident, offset).to(x.dtype)


def _view(format: ModuleFormat) -> FourBits:
    bits = four_bits(format)
    assert bits is not None, "ask `takes` first"
    return bits


def _convert(words: torch.Tensor, format: ModuleFormat, nibbles: torch.Tensor) -> None:
    pack_words(words, _view(format).order, nibbles)


def _by_op(x: torch.Tensor, resident: Mapping[str, torch.Tensor], offset: int) -> torch.Tensor:
    """[rows, in] bf16 through torch's kernel; what bf16 zeros lose is added in float32."""
    scales, nibbles, x = resident["scales"], resident["nibbles"], aligned(x)
    group_size = x.shape[1] // scales.shape[0]
    size = math.gcd(group_size, LARGEST_GROUP)
    repeats = group_size // size
    both = torch.empty(*scales.shape, 2, dtype=torch.bfloat16)
    if "zeros" not in resident:
        both.view(torch.int32).squeeze(-1).copy_(_bf16_bits(scales))
        return torch._weight_int4pack_mm_for_cpu(x, nibbles, size, both.repeat_interleave(repeats, 0))
    zeros = _zero_points(resident["zeros"], offset).sub_(8).neg_() * scales.float()
    both[..., 0], both[..., 1] = scales, zeros
    y = torch._weight_int4pack_mm_for_cpu(x, nibbles, size, both.repeat_interleave(repeats, 0))
    sums = x.float().view(len(x), len(scales), group_size).sum(-1)
    return y.float().addmm_(sums, zeros - both[..., 1].float()).to(x.dtype)


def _by_panels(x: torch.Tensor, resident: Mapping[str, torch.Tensor], offset: int) -> torch.Tensor:
    """[rows, in] times panels of Wᵀ [in, some out], decoded a tile of torch's layout at a time."""
    columns, (groups, rows), dtype = x.shape[1], resident["scales"].shape, compute_dtype(x)
    # What is decoded is 16·(q - 8), see nibbles.signed_halves.
    # Zero points may make groups cancel out, which leaves no room for rounded scales: float32.
    zeros = None
    if "zeros" in resident:
        zeros = _zero_points(resident["zeros"], offset).sub_(8).mul_(16).unsqueeze(1)
    work = dtype if zeros is None else torch.float32
    scales = (resident["scales"].to(work) / 16).unsqueeze(1)
    width = max(1, PANEL_BYTES // (dtype.itemsize * columns * TILE)) * TILE
    panel, y, x_cast = torch.empty(columns, min(width, rows), dtype=dtype), x.new_empty(len(x), rows), x.to(dtype)
    for start, stop in spans(0, rows, width):
        for low, high in tiles(stop, start):
            halves = signed_halves(resident["nibbles"], low, high)
            for half, own in zip(halves, rows_of_halves(low, high), strict=True):
                codes = half.to(work).view(groups, columns // groups, -1)
                target = panel.view(groups, columns // groups, -1)[..., own.start - start : own.stop - start : own.step]
                if zeros is None:
                    torch.mul(codes, scales[..., own], out=target)
                else:
                    target.copy_(codes.sub_(zeros[..., own]).mul_(scales[..., own]))
        y[:, start:stop] = x_cast @ panel[:, : stop - start]
    return y


def _bf16_bits(scales: torch.Tensor) -> torch.Tensor:
    """int32 whose low half is the scale rounded to bf16 and whose high half, the zero in memory, is 0."""
    # By way of float32, for which torch has vector conversions.
    return scales.float().to(torch.bfloat16).view(torch.int16).to(torch.int32).bitwise_and_(0xFFFF)


def _zero_points(zeros: torch.Tensor, offset: int) -> torch.Tensor:
    """float32 [groups, out]; 16 is a possible one, it does not wrap."""
    codes = unpack(zeros.t(), BITS).t()
    return codes.to(torch.float32, memory_format=torch.contiguous_format).add_(offset)
