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
from ..formats.scaled import scale_values
from . import native
from .base import FileLayout, Tensors
from .compiled import available
from .panels import STRIP_VALUES, linear_by_panels, spans

#: Up to so many rows the products run in float16, whose GEMM is the faster one until matrix units pay.
FEW_ROWS = 4
#: Values decoded at once for them: calls cost more than leaving the second-level cache.
FEW_ROWS_STRIP = 1 << 20
#: Few rows meet the scales of a block of rows before W; smaller blocks would make that a product each.
MIN_BLOCK_ROWS = 32
#: To float16 and bfloat16: factor that shifts, and which bits that the widened sign filled then go.
TO_FP16, TO_BF16 = (1 << 7, ~0x4000), (1 << 4, ~0x7800)


class FP8(FileLayout):
    """FP8 per tensor, per channel or in blocks of any size, MXFP8's too."""

    name = "fp8"
    takes_bias = False

    def takes(self, format: ModuleFormat) -> bool:
        """All of FP8."""
        return format.name == "fp8"

    def pack(self, tensors: Mapping[str, torch.Tensor], format: ModuleFormat) -> Tensors:
        """The tensors as they are, if no weight is NaN."""
        refuse_nan(tensors["weight"])
        return super().pack(tensors, format)

    def linear(self, x: torch.Tensor, resident: Mapping[str, torch.Tensor], format: ModuleFormat) -> torch.Tensor:
        """Compiled; else few bf16 rows: scales folded into x; more rows or another dtype: panels."""
        p: FP8Parameters = format.parameters
        weight, scale = resident["weight"].view(torch.int8), resident[p.scale_name]
        if scale.dtype not in native.FLOAT_TYPES or scale.ndim == 4:
            scale = scale_values(scale)
        if native.takes(x):
            height, width = p.block or (1 if scale.numel() > 1 else len(weight), x.shape[1])
            return native.Octets(native.FP8, weight, scale, height, width, p.inverse).linear(x)
        scale = scale.float().reciprocal() if p.inverse else scale.float()
        few = 0 < x.shape[0] <= FEW_ROWS and x.dtype == torch.bfloat16
        if p.block is None:
            y = _few_rows(weight, x.float()[None], len(weight)) if few else _by_panels(x, weight).float()
            return y.mul_(scale.reshape(-1)).to(x.dtype)
        if few and p.block[0] >= MIN_BLOCK_ROWS:
            return _few_rows(weight, x.float() * _spread(scale, p.block[1], x.shape[1])[:, None], p.block[0]).to(
                x.dtype
            )
        return _by_scaled_panels(x, weight, scale * 256, p.block)


def refuse_nan(weight: torch.Tensor) -> None:
    """FormatError if an e4m3 weight holds a NaN code: every bit trick would read it as a number."""
    if (row := _nan_row(weight)) is not None:
        raise FormatError(
            f"a weight in row {row} is NaN",
            tensor="weight",
            rule="e4m3 codes 0x7F and 0xFF are no numbers",
            remedy="export the checkpoint again, or map this module to another source",
        )


def _nan_row(weight: torch.Tensor) -> int | None:
    if available() and weight.is_contiguous() and not native.has_nan(weight):
        return None
    for start, stop in spans(0, len(weight), 1024):
        rows = weight[start:stop]
        # 0x7F is the greatest int8, 0xFF the greatest uint8: two fast reductions.
        if rows.numel() and (rows.view(torch.int8).amax() == 127 or rows.view(torch.uint8).amax() == 255):
            codes = rows.view(torch.uint8) & 0x7F
            return start + int((codes == 0x7F).any(1).int().argmax())
    return None


def _spread(scale: torch.Tensor, width: int, columns: int) -> torch.Tensor:
    """Block scales [blocks, blocks] -> float32 [blocks, in]."""
    return scale.unsqueeze(-1).expand(-1, -1, width).flatten(1)[:, :columns].contiguous()


def _few_rows(weight: torch.Tensor, x: torch.Tensor, block: int) -> torch.Tensor:
    """int8 [out, in] times x float32 [blocks, rows, in], each `block` rows of W meeting their own x -> [rows, out]."""
    (out_features, in_features), num_rows = weight.shape, x.shape[1]
    # |w·2⁻⁸| < 2: with |x| < 2^room no sum can leave float16.
    room = 15 - math.ceil(math.log2(in_features))
    fraction, power = torch.frexp(x.abs().amax(2, keepdim=True))
    x16, unit = torch.ldexp(x, room - power).half(), torch.ldexp(torch.ones_like(fraction), power + (8 - room))
    strip = max(1, FEW_ROWS_STRIP // in_features)
    buffer = torch.empty(min(strip, out_features), in_features, dtype=torch.int16)
    y16 = torch.empty(num_rows, out_features, dtype=torch.float16)
    for low, high in spans(0, out_features, strip):
        codes = _shift(weight[low:high], buffer[: high - low], TO_FP16).view(torch.float16)
        for index in range(low // block, -(-high // block)):
            start, stop = max(low, index * block), min(high, (index + 1) * block)
            y16[:, start:stop] = F.linear(x16[index], codes[start - low : stop - low])
    return y16.float().mul_(unit.squeeze(2).t().repeat_interleave(block, 1)[:, :out_features])


def _by_panels(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x times the unscaled e4m3 values."""

    def decode(start: int, stop: int, target: torch.Tensor) -> None:
        if target.dtype == torch.bfloat16:
            _shift(weight[start:stop], target.view(torch.int16), TO_BF16)
            target.mul_(2.0**120)
        else:
            codes = torch.empty(target.shape, dtype=torch.int16)
            target.copy_(_shift(weight[start:stop], codes, TO_FP16).view(torch.float16)).mul_(256)

    return linear_by_panels(x, (weight.shape[0], weight.shape[1]), decode)


def _by_scaled_panels(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]
) -> torch.Tensor:
    """x times e4m3 values / 256 times block scales, which rounded to bf16 would cost as much as W's rounding."""
    (out_features, columns), (height, width) = weight.shape, block
    strip = max(1, STRIP_VALUES // columns)
    buffer, wide = torch.empty(strip, columns, dtype=torch.int16), torch.empty(strip, columns)

    def decode(start: int, stop: int, target: torch.Tensor) -> None:
        codes, values = buffer[: stop - start], wide[: stop - start]
        values.copy_(_shift(weight[start:stop], codes, TO_FP16).view(torch.float16))
        low, high = start // height, -(-stop // height)
        factors = _spread(scale[low:high], width, columns)
        if high - low > 1:
            factors = factors.repeat_interleave(height, 0)[start - low * height : stop - low * height]
        target.copy_(values.mul_(factors))

    return linear_by_panels(x, (out_features, columns), decode, strip)


def _shift(octets: torch.Tensor, target: torch.Tensor, how: tuple[int, int]) -> torch.Tensor:
    """e4m3 bytes, as int8, to the bits of a 16-bit float in `target` int16."""
    factor, mask = how
    target.copy_(octets)
    # Multiplied, because torch's shifts are scalar loops.
    return target.mul_(factor).bitwise_and_(mask)
