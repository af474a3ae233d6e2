"""INT8 weights with 16-bit activations, one octet a weight as in the file; packed octets lose their offset."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch

from ..formats import ModuleFormat
from . import native
from .base import FileLayout, Layout, Tensors, aligned, is_aligned, owned
from .implied import implied, without_implied
from .panels import linear_by_panels

#: Up to so many rows torch's weight-only kernel, which converts W once for every four, beats the integer products.
FEW_ROWS = 4
#: From here on one bf16 product beats two integer ones with their sums.
MANY_ROWS = 256
#: Of packed integers.
PACKED, SCALE = "weight_packed", "weight_scale"
#: |int8 · int8| <= 2¹⁴, so an int32 sum holds so many.
MAX_COLUMNS = 1 << 17


class Int8(FileLayout):
    """W8A16 without rounding x to 8 bits: x is split in two int8 halves, each multiplied exactly in integers."""

    name = "int8"
    takes_bias = False

    def takes(self, format: ModuleFormat) -> bool:
        """int8 weights, and packed ones of 8 bits whose groups lie in order; sums of either must fit 31 bits."""
        if not (format.name == "int8" or _is_packed(format)):
            return False
        return format.shape[1] < MAX_COLUMNS and _integers_are_exact()

    def layout(self, format: ModuleFormat) -> Layout:
        """`weight` int8 [out, in], and the checkpoint's own scale."""
        if not _is_packed(format):
            return super().layout(format)
        return {"weight": (torch.int8, format.shape), SCALE: super().layout(format)[SCALE]}

    def pack(self, tensors: Mapping[str, torch.Tensor], format: ModuleFormat) -> Tensors:
        """The same tensors; of packed ones the octets without their offset of 128."""
        if not _is_packed(format):
            return super().pack(tensors, format)
        kept = without_implied(tensors, format)
        weight = _flipped(kept[PACKED].contiguous().view(torch.int8))
        return {"weight": weight, SCALE: owned(kept[SCALE])}

    def unpack(self, resident: Mapping[str, torch.Tensor], format: ModuleFormat) -> Tensors:
        """The same tensors; of packed ones the words."""
        if not _is_packed(format):
            return super().unpack(resident, format)
        words = _flipped(resident["weight"]).view(torch.int32)
        return {PACKED: words, SCALE: resident[SCALE], **implied(format)}

    def linear(self, x: torch.Tensor, resident: Mapping[str, torch.Tensor], format: ModuleFormat) -> torch.Tensor:
        """Compiled; else few rows: weight-only kernel; more: integer products; many: panels of unscaled integers."""
        weight, scale = resident["weight"], resident[_scale_name(format)]
        by_group = _is_packed(format) and format.parameters.group_size < x.shape[1]
        width = format.parameters.group_size if by_group else x.shape[1]
        if native.takes(x) and (by_group or not native.MAX_ROWS < x.shape[0] < MANY_ROWS):
            height = 1 if scale.numel() > 1 else len(weight)
            return native.Octets(native.INT8, weight, scale, height, width).linear(x)
        if by_group:
            return _by_scaled_panels(x, weight, scale.float(), width)
        scale = scale.reshape(-1)
        # The weight-only kernel reads 16 columns at once, aligned; anything else is a crash, not an error.
        if 0 < x.shape[0] <= FEW_ROWS and x.dtype == torch.bfloat16 and x.shape[1] % 16 == 0 and is_aligned(weight):
            return torch._weight_int8pack_mm(aligned(x), weight, scale.to(x.dtype).expand(len(weight)).contiguous())
        if x.shape[0] >= MANY_ROWS and x.dtype == torch.bfloat16:
            y = linear_by_panels(x, format.shape, lambda start, stop, target: target.copy_(weight[start:stop]))
            return y.float().mul_(scale.float()).to(x.dtype)
        return _two_halves(x, weight, scale)


def _is_packed(format: ModuleFormat) -> bool:
    p = format.parameters
    return format.name == "packed" and p.bits == 8 and p.symmetric and not p.act_order


def _scale_name(format: ModuleFormat) -> str:
    name: str = SCALE if _is_packed(format) else format.parameters.scale_name
    return name


def _flipped(octets: torch.Tensor) -> torch.Tensor:
    """int8 with the sign bit turned: to and from an offset of 128."""
    return octets ^ -128


def _by_scaled_panels(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, width: int) -> torch.Tensor:
    """x times int8 [out, in] times float32 scales [out, groups] of `width` columns."""

    def decode(start: int, stop: int, target: torch.Tensor) -> None:
        factors = scale[start:stop].repeat_interleave(width, 1)[:, : weight.shape[1]]
        target.copy_(weight[start:stop].float().mul_(factors))

    return linear_by_panels(x, (weight.shape[0], weight.shape[1]), decode)


def _two_halves(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x ≈ (256·high + low)·step with 16 bits per row: the error is below K / 2³³ of the output's energy."""
    x32 = x.float()
    step = x32.abs().amax(1, keepdim=True).div_(32512).clamp_min_(torch.finfo(torch.float32).tiny)
    whole = (x32 / step).round_().to(torch.int16)
    halves = torch.cat([(whole + 128).__irshift__(8), whole]).to(torch.int8)  # the low one wraps, as it should
    high, low = torch._int_mm(halves, weight.t()).float().chunk(2)
    return low.add_(high, alpha=256).mul_(step).mul_(scale.float()).to(x.dtype)


@functools.cache
def _integers_are_exact() -> bool:
    """Old instruction sets saturate sums of two int8 products at 16 bits."""
    a = torch.full((2, 64), -128, dtype=torch.int8)
    return bool((torch._int_mm(a, a.t()) == 64 << 14).all())
