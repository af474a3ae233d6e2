"""The fallback: any format, decoded by its own reference a few rows at a time. Correct, not fast."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from ..errors import UnsupportedError
from ..formats import ModuleFormat, get_format
from .base import FileLayout
from .panels import compute_dtype, linear_by_panels

# The references work in float32 and int16, several temporaries at once.
CHUNK_VALUES = 1 << 18


class Chunked(FileLayout):
    """Every registered format, in the file's own layout."""

    name = "chunked"

    def takes(self, format: ModuleFormat) -> bool:
        """Everything."""
        return True

    def linear(self, x: torch.Tensor, resident: Mapping[str, torch.Tensor], format: ModuleFormat) -> torch.Tensor:
        """Dequantize in chunks of rows that end where the packed units of every tensor end."""
        if len(format.shape) != 2:
            raise UnsupportedError(f"a weight of shape {list(format.shape)} is not a linear layer's", rule="[out, in]")
        reference = get_format(format.name)
        specs = reference.tensors(format.parameters, format.shape)
        axes = {name: specs[name].axes for name in resident}
        unit = math.lcm(*(axis.values for each in axes.values() for axis in each if axis.role == "out"))
        dtype = compute_dtype(x)

        def decode(start: int, stop: int, target: torch.Tensor) -> None:
            part = dict(resident)
            for name, each in axes.items():
                for dim, axis in enumerate(each):
                    if axis.role == "out":
                        low, high = axis.length(start), axis.length(stop)
                        part[name] = part[name].narrow(dim, low, high - low)
            target.copy_(reference.dequantize(part, format.parameters, dtype))

        strip = math.ceil(CHUNK_VALUES / format.shape[1] / unit) * unit
        return linear_by_panels(x, format.shape, decode, strip)
