"""GPTQ 4-bit weights on torch's int4pack kernel, which computes W = (q - 8)·scale + zero in groups along `in`.

At rest: the nibbles in the order that torch's kernel wants on this CPU, scales in the file's dtype, zero points still
packed, and for act-order the permutation that sorts g_idx. What a call needs besides is derived in the call.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..errors import UnsupportedError
from ..formats import ModuleFormat
from ..formats.base import TORCH_DTYPES
from ..formats.gptq import GPTQParameters, unpack
from . import native
from .base import Layout, Tensors, aligned, owned
from .implied import implied, without_implied
from .nibbles import TILE, decode_rows, layout_is_known, pack_rows, rows_of_halves, signed_halves, tiles
from .panels import PANEL_BYTES, compute_dtype, spans

GROUPS = frozenset((32, 64, 128, 256))
#: From here on decoding to panels beats torch's kernel, which decodes W again for every four rows of x.
MANY_ROWS = 40


class Int4:
    """GPTQ 4 bits: v1 and v2, symmetric or not, with or without act-order."""

    name = "int4"

    def takes(self, format: ModuleFormat) -> bool:
        """4 bits, whole groups of 32, 64, 128 or 256 columns, rows a multiple of 16."""
        p = format.parameters
        if format.name != "gptq" or p.bits != 4 or p.group_size not in GROUPS:
            return False
        return format.shape[0] % 16 == 0 and format.shape[1] % p.group_size == 0

    def layout(self, format: ModuleFormat) -> Layout:
        """Nibbles [out, in/2], scales [groups, out], then packed zeros and permutation where the format has them."""
        p, (rows, columns) = format.parameters, format.shape
        groups = columns // p.group_size
        layout: Layout = {
            "nibbles": (torch.uint8, (rows, columns // 2)),
            "scales": (TORCH_DTYPES[p.scale_dtype], (groups, rows)),
        }
        if not p.symmetric:
            layout["qzeros"] = (torch.int32, (groups, rows // 8))
        if p.act_order:
            layout["permutation"] = (torch.int32, (columns,))
        return layout

    def pack(self, tensors: Mapping[str, torch.Tensor], format: ModuleFormat) -> Tensors:
        """Reorder the nibbles; constant zeros and consecutive g_idx are checked, then left out."""
        kept = without_implied(tensors, format)
        order = _sorting(kept["g_idx"], format.parameters) if "g_idx" in kept else None
        resident = {"nibbles": pack_rows(kept["qweight"], order), "scales": owned(kept["scales"])}
        if "qzeros" in kept:
            resident["qzeros"] = owned(kept["qzeros"])
        if order is not None:
            resident["permutation"] = order.to(torch.int32)
        return resident

    def unpack(self, resident: Mapping[str, torch.Tensor], format: ModuleFormat) -> Tensors:
        """Nibbles back to int32 words along `in`; what was left out is rebuilt from the parameters."""
        p, (rows, columns) = format.parameters, format.shape
        place = torch.argsort(resident["permutation"]) if p.act_order else slice(None)
        qweight = torch.empty(columns // 8, rows, dtype=torch.int32)
        for low, high in tiles(rows):
            qweight[:, low:high] = _to_words(decode_rows(resident["nibbles"], low, high)[place])
        tensors = {"qweight": qweight, "scales": resident["scales"], **implied(format)}
        if not p.symmetric:
            tensors["qzeros"] = resident["qzeros"]
        if p.act_order:
            tensors["g_idx"] = (torch.arange(columns, dtype=torch.int32) // p.group_size)[place]
        return tensors

    def linear(self, x: torch.Tensor, resident: Mapping[str, torch.Tensor], format: ModuleFormat) -> torch.Tensor:
        """Compiled; else few bf16 rows: torch's kernel; more rows or another dtype: panels."""
        if "permutation" in resident:
            x = x.index_select(1, resident["permutation"])
        if layout_is_known() and native.takes(x):
            scales, offset = resident["scales"], format.parameters.zero_offset
            return native.Nibbles(resident["nibbles"], scales, resident.get("qzeros"), offset).linear(x)
        if layout_is_known() and (x.dtype != torch.bfloat16 or x.shape[0] >= MANY_ROWS):
            return _by_panels(x, resident, format.parameters)
        return _by_op(x.to(torch.bfloat16), resident, format.parameters).to(x.dtype)


def _by_op(x: torch.Tensor, resident: Mapping[str, torch.Tensor], p: GPTQParameters) -> torch.Tensor:
    """[rows, in] bf16 through torch's kernel; what bf16 zeros lose is added in float32."""
    scales, nibbles, x = resident["scales"], resident["nibbles"], aligned(x)
    both = torch.empty(*scales.shape, 2, dtype=torch.bfloat16)
    if "qzeros" not in resident:
        both.view(torch.int32).squeeze(-1).copy_(_bf16_bits(scales))
        return torch._weight_int4pack_mm_for_cpu(x, nibbles, p.group_size, both)
    zeros = _zero_points(resident["qzeros"], p).sub_(8).neg_() * scales.float()
    both[..., 0], both[..., 1] = scales, zeros
    y = torch._weight_int4pack_mm_for_cpu(x, nibbles, p.group_size, both)
    sums = x.float().view(len(x), len(scales), p.group_size).sum(-1)
    return y.float().addmm_(sums, zeros - both[..., 1].float()).to(x.dtype)


def _by_panels(x: torch.Tensor, resident: Mapping[str, torch.Tensor], p: GPTQParameters) -> torch.Tensor:
    """[rows, in] times panels of Wᵀ [in, some out], decoded a tile of torch's layout at a time."""
    columns, (groups, rows), dtype = x.shape[1], resident["scales"].shape, compute_dtype(x)
    # What is decoded is 16·(q - 8), see nibbles.signed_halves.
    # Zero points may make groups cancel out, which leaves no room for rounded scales: float32.
    zeros = None if p.symmetric else _zero_points(resident["qzeros"], p).sub_(8).mul_(16).unsqueeze(1)
    work = dtype if zeros is None else torch.float32
    scales = (resident["scales"].to(work) / 16).unsqueeze(1)
    width = max(1, PANEL_BYTES // (dtype.itemsize * columns * TILE)) * TILE
    panel, y, x_cast = torch.empty(columns, min(width, rows), dtype=dtype), x.new_empty(len(x), rows), x.to(dtype)
    for start, stop in spans(0, rows, width):
        for low, high in tiles(stop, start):
            halves = signed_halves(resident["nibbles"], low, high)
            for half, own in zip(halves, rows_of_halves(low, high), strict=True):
                codes = half.to(work).view(groups, p.group_size, -1)
                target = panel.view(groups, p.group_size, -1)[..., own.start - start : own.stop - start : own.step]
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


def _zero_points(qzeros: torch.Tensor, p: GPTQParameters) -> torch.Tensor:
    """float32 [groups, out]; 16 is a possible one, it does not wrap."""
    return unpack(qzeros.t(), 4).t().to(torch.float32, memory_format=torch.contiguous_format).add_(p.zero_offset)


def _sorting(g_idx: torch.Tensor, p: GPTQParameters) -> torch.Tensor:
    """int64 [in] that sorts act-order's g_idx into whole consecutive groups."""
    order = torch.argsort(g_idx, stable=True)
    if not torch.equal(g_idx[order], torch.arange(len(g_idx), dtype=g_idx.dtype) // p.group_size):
        raise UnsupportedError(
            "g_idx does not give every group the same number of columns",
            tensor="g_idx",
            rule=f"{p.group_size} columns of each group",
        )
    return order


def _to_words(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [in, n] of 0..15 -> int32 [in/8, n], lowest nibble first."""
    octets = codes[0::2] | (codes[1::2] << 4)  # [in/2, n], four to a word
    return octets.view(-1, 4, octets.shape[1]).transpose(1, 2).contiguous().view(torch.int32).squeeze(-1)
