"""A GEMM whose weight exists only a few rows at a time.

The weight is decoded in *strips* that stay in the second-level cache through all elementwise steps; strips fill a
*panel* of at most 4 MB, and one GEMM runs per panel, because GEMMs on fewer rows of W waste the matrix units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from ..formats.base import Shape

PANEL_BYTES = 4 << 20
STRIP_VALUES = 1 << 17

#: (start, stop, target): write rows [start, stop) of W to target [stop - start, in].
Decode = Callable[[int, int, torch.Tensor], object]


def linear_by_panels(
    x: torch.Tensor, shape: Shape, decode: Decode, strip: int = 0, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x [rows, in] times W [out, in] as `decode` gives it -> [rows, out] in x's dtype.

    A bf16 x meets a bf16 W; any other runs in float32. `strip` rows are decoded at once (0: as many as fit the cache).
    """
    out_features, in_features = shape
    dtype = compute_dtype(x)
    strip = strip or max(1, STRIP_VALUES // in_features)
    height = min(out_features, max(1, PANEL_BYTES // (dtype.itemsize * in_features * strip)) * strip)
    panel = torch.empty(height, in_features, dtype=dtype)
    y, x_cast = x.new_empty(x.shape[0], out_features), x.to(dtype)
    for start, stop in spans(0, out_features, height):
        for low, high in spans(start, stop, strip):
            decode(low, high, panel[low - start : high - start])
        own = None if bias is None else bias[start:stop].to(dtype)
        y[:, start:stop] = F.linear(x_cast, panel[: stop - start], own)
    return y


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """What x meets a decoded weight in: bf16 stays, fp16 would overflow, so all else runs in float32."""
    return torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32


def spans(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    """(low, high) pieces of [start, stop) of at most `step`."""
    for low in range(start, stop, step):
        yield low, min(low + step, stop)
