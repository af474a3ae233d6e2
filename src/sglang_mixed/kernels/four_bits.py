"""The formats of four bits, as their one kernel sees them: which tensor is what, and how its values are ordered.

The kernel wants scales [groups, out] and zero points as packed nibbles int32 [groups, out/8] in the order of `out`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..formats import ModuleFormat
from .base import Tensors

BITS = 4
#: Columns of a group come in such runs.
RUN = 32


@dataclass(frozen=True, slots=True)
class FourBits:
    """W = (code - zero point) x scale; all zero points are 8 where none is kept.

    `order` is that of the words of `codes` (and, in AWQ, of `zeros`); `by_rows` says that scales and zeros lie
    [out, groups]; with act-order a column's group is in `g_idx`.
    """

    order: str
    codes: str
    scales: str
    zeros: str | None
    g_idx: str | None
    group_size: int
    scale_dtype: str
    by_rows: bool = False

    def scales_of(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """[groups, out] in the file's dtype; the file's own memory if it lies so."""
        scales = tensors[self.scales]
        return scales.t().contiguous() if self.by_rows else scales

    def zeros_of(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """int32 [groups, out/8], or None where all zero points are 8."""
        if self.zeros is None:
            return None
        zeros = tensors[self.zeros]
        if self.order == "awq":
            return _in_order(zeros)
        return zeros.t().contiguous() if self.by_rows else zeros

    def stored(self, scales: torch.Tensor, zeros: torch.Tensor | None) -> Tensors:
        """The inverse: scales and zeros as the checkpoint holds them."""
        tensors = {self.scales: scales.t().contiguous() if self.by_rows else scales}
        if self.zeros is not None and zeros is not None:
            if self.order == "awq":
                zeros = _interleaved(zeros)
            tensors[self.zeros] = zeros.t().contiguous() if self.by_rows else zeros
        return tensors


def four_bits(format: ModuleFormat) -> FourBits | None:
    """How the kernel reads this format; None for a weight it cannot hold: groups must be whole runs of columns."""
    p: Any = format.parameters
    if format.name not in _VIEWS or p.bits != BITS or len(format.shape) != 2:
        return None
    rows, columns = format.shape
    # A part of an act-order weight's columns has no groups of one size.
    whole = getattr(p, "num_groups", None) is None and columns % p.group_size == 0 and p.group_size % RUN == 0
    return _VIEWS[format.name](p) if whole and rows % 16 == 0 else None


def _gptq(p: Any) -> FourBits:
    zeros, g_idx = None if p.symmetric else "qzeros", "g_idx" if p.act_order else None
    return FourBits("gptq", "qweight", "scales", zeros, g_idx, p.group_size, p.scale_dtype)


def _awq(p: Any) -> FourBits:
    return FourBits("awq", "qweight", "scales", "qzeros", None, p.group_size, p.scale_dtype)


def _packed(p: Any) -> FourBits | None:
    if p.strategy == "tensor":
        return None
    zeros, g_idx = None if p.symmetric else "weight_zero_point", "weight_g_idx" if p.act_order else None
    names = "packed", "weight_packed", "weight_scale"
    return FourBits(*names, zeros, g_idx, p.group_size, p.scale_dtype, by_rows=True)


_VIEWS = {"gptq": _gptq, "awq": _awq, "packed": _packed}


def _in_order(words: torch.Tensor) -> torch.Tensor:
    """AWQ's int32 words, whose low half has the even columns and whose high half the odd ones, with these in turn."""
    halves = torch.stack([words & 0xFFFF, (words >> 16) & 0xFFFF])
    halves = (halves | halves << 8) & 0x00FF00FF
    halves = (halves | halves << BITS) & 0x0F0F0F0F
    return halves[0] | halves[1] << BITS


def _interleaved(words: torch.Tensor) -> torch.Tensor:
    """The inverse."""
    halves = torch.stack([words, words >> BITS]) & 0x0F0F0F0F
    halves = (halves | halves >> BITS) & 0x00FF00FF
    halves = (halves | halves >> 8) & 0xFFFF
    return halves[0] | halves[1] << 16
