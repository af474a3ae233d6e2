"""Any format, decoded by its own reference a few rows at a time: exactly what the dequantized model computes.

The fallback of what no faster kernel takes, and the kernel of small weights, where it costs less than a millisecond.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from ..errors import UnsupportedError
from ..formats import ModuleFormat, get_format
from .base import FileLayout, Layout, Tensors
from .fp8 import refuse_nan
from .implied import implied, without_implied
from .panels import compute_dtype, linear_by_panels

# The references work in float32 and int16, several temporaries at once.
CHUNK_VALUES = 1 << 18
#: Above this lie the matrices of real models, if only k_proj's or an expert's on one of many ranks: decoding 2²⁰ values
#: by the reference takes 15 (INT8) to 90 (FP8) times as long as a fast kernel's product with one row.
SMALL_VALUES = 1 << 17


class Chunked(FileLayout):
    """Every registered format, in the file's own layout but for what the parameters imply."""

    name = "chunked"
    takes_bias = True

    def takes(self, format: ModuleFormat) -> bool:
        """Everything."""
        return True

    def layout(self, format: ModuleFormat) -> Layout:
        """The checkpoint's own tensors, without the implied ones."""
        left_out = implied(format)
        return {name: kept for name, kept in super().layout(format).items() if name not in left_out}

    def pack(self, tensors: Mapping[str, torch.Tensor], format: ModuleFormat) -> Tensors:
        """The same tensors; implied ones are checked."""
        if format.name == "fp8":
            refuse_nan(tensors["weight"])
        return super().pack(without_implied(tensors, format), format)

    def unpack(self, resident: Mapping[str, torch.Tensor], format: ModuleFormat) -> Tensors:
        """The same tensors, and the implied ones."""
        return {**resident, **implied(format)}

    def linear(
        self,
        x: torch.Tensor,
        resident: Mapping[str, torch.Tensor],
        format: ModuleFormat,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Dequantize in chunks of rows that end where the packed units of every tensor end."""
        if len(format.shape) != 2:
            raise UnsupportedError(f"a weight of shape {list(format.shape)} is not a linear layer's", rule="[out, in]")
        reference, resident = get_format(format.name), {**resident, **implied(format)}
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
        return linear_by_panels(x, format.shape, decode, strip, bias)


class Small(Chunked):
    """Quantized matrices so small that speed matters less than being exact to the last bit."""

    name = "small"

    def takes(self, format: ModuleFormat) -> bool:
        """At most SMALL_VALUES weights."""
        return format.name != "plain" and len(format.shape) == 2 and math.prod(format.shape) <= SMALL_VALUES
