"""INT8 weights with 16-bit activations, in the file's own layout."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch

from ..formats import ModuleFormat
from . import native
from .base import FileLayout, aligned, is_aligned
from .panels import linear_by_panels

#: Up to so many rows torch's weight-only kernel, which converts W once for every four, beats the integer products.
FEW_ROWS = 4
#: From here on one bf16 product beats two integer ones with their sums.
MANY_ROWS = 256
#: |int8 · int8| <= 2¹⁴, so an int32 sum holds so many.
MAX_COLUMNS = 1 << 17


class Int8(FileLayout):
    """W8A16 without rounding x to 8 bits: x is split in two int8 halves, each multiplied exactly in integers."""

    name = "int8"
    takes_bias = False

    def takes(self, format: ModuleFormat) -> bool:
        """int8 weights, where the machine's integer products are exact."""
        return format.name == "int8" and format.shape[1] < MAX_COLUMNS and integers_are_exact()

    def linear(self, x: torch.Tensor, resident: Mapping[str, torch.Tensor], format: ModuleFormat) -> torch.Tensor:
        """See `multiply`."""
        return multiply(x, resident["weight"], resident[format.parameters.scale_name], x.shape[1])


def multiply(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, width: int) -> torch.Tensor:
    """x [rows, in] times int8 [out, in] times scales of one value, [out] or [out, groups] of `width` columns.

    Compiled; else few rows: weight-only kernel; more: integer products; many: panels of unscaled integers.
    """
    by_group = width < x.shape[1]
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
        shape = weight.shape[0], weight.shape[1]
        y = linear_by_panels(x, shape, lambda start, stop, target: target.copy_(weight[start:stop]))
        return y.float().mul_(scale.float()).to(x.dtype)
    return _two_halves(x, weight, scale)


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
def integers_are_exact() -> bool:
    """Old instruction sets saturate sums of two int8 products at 16 bits."""
    a = torch.full((2, 64), -128, dtype=torch.int8)
    return bool((torch._int_mm(a, a.t()) == 64 << 14).all())
