"""FP8 e4m3 weights in the file's own layout, decoded by shifting bits.

An e4m3 byte `seeeemmm` shifted to `s0eeeemm m0000000` reads as float16 of exactly w·2⁻⁸, to `s0000eee emmm0000` as
bfloat16 of w·2⁻¹²⁰; subnormals come out right in both. Only the NaN codes do not, so `pack` refuses them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F

from ..errors import FormatError
from ..formats import ModuleFormat
from ..formats.fp8 import FP8Parameters
from . import compiled
from .base import FileLayout, Tensors
from .panels import STRIP_VALUES, linear_by_panels, spans

#: Up to so many rows the products run in float16, whose GEMM is the faster one until matrix units pay.
FEW_ROWS = 8
#: Smaller row blocks would need too many scaled copies of x.
MIN_BLOCK_ROWS = 32
NAN_CODE = 0x7F
# Adding a half of the sign's place carries a widened sign bit into the sign's place; the mask drops what is left below.
TO_FP16 = (128, torch.tensor(1 << 14, dtype=torch.int16), ~(1 << 14))
TO_BF16 = (16, torch.tensor(0x7800, dtype=torch.int16), ~0x7800 | 0x7000)


class FP8(FileLayout):
    """FP8 per tensor, per channel or in blocks."""

    name = "fp8"

    def takes(self, format: ModuleFormat) -> bool:
        """Any e4m3 matrix."""
        return format.name == "fp8"

    def pack(self, tensors: Mapping[str, torch.Tensor], format: ModuleFormat) -> Tensors:
        """The tensors as they are, if no weight is NaN."""
        octets = tensors["weight"].view(torch.uint8)
        for start, stop in spans(0, len(octets), 1024):
            if bool((octets[start:stop] & NAN_CODE == NAN_CODE).any()):
                raise FormatError(
                    f"a weight in rows {start} to {stop - 1} is NaN",
                    tensor="weight",
                    rule="e4m3 codes 0x7F and 0xFF are no numbers",
                    remedy="export the checkpoint again, or map this module to another source",
                )
        return super().pack(tensors, format)

    def linear(self, x: torch.Tensor, resident: Mapping[str, torch.Tensor], format: ModuleFormat) -> torch.Tensor:
        """One row: compiled, if that is on; few: float16 with the scales folded into x; more: panels."""
        p: FP8Parameters = format.parameters
        weight, scale = resident["weight"], resident[p.scale_name].float()
        scale = scale.reciprocal() if p.inverse else scale
        if p.block is None:
            scale = scale.reshape(-1)
            if 0 < x.shape[0] <= FEW_ROWS and x.dtype == torch.bfloat16:
                return _few_rows(x, weight, x.float()[None]).mul_(scale).to(x.dtype)
            return _by_channel(x, weight).float().mul_(scale).to(x.dtype)
        if 0 < x.shape[0] <= FEW_ROWS and x.dtype == torch.bfloat16 and p.block[0] >= MIN_BLOCK_ROWS:
            spread = scale.repeat_interleave(p.block[1], 1)[:, None, : x.shape[1]]
            return _few_rows(x, weight, x.float() * spread, p.block[0]).to(x.dtype)
        return _by_block(x, weight, scale, p.block)
