"""MXFP4 (OCP Microscaling): e2m1 values with a power of two, e8m0, per 32 columns.

Read: compressed-tensors' `mxfp4-pack-quantized`, AutoRound's and Quark's exports (uint8 values [out, in/2] and
exponents [out, in/32], biased by 127), and DeepSeek's experts (the same as I8 `weight` and F8_E8M0 `scale`).
GPT-OSS's, stacked over all experts of a layer, come here as each expert's uint8 `weight` and `weight_scale`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .base import Axis, ModuleFormat, Shape, TensorInfo, TensorSpec, bias_spec, check_tensors
from .fp4 import scale_groups, unpack_values
from .scaled import claimed, scale_values

GROUP_SIZE = 32
#: (packed values, their dtype, scale, its dtype) of each known layout.
LAYOUTS = (
    ("weight_packed", "U8", "weight_scale", "U8"),
    ("weight", "U8", "weight_scale", "U8"),
    ("weight", "I8", "scale", "F8_E8M0"),
)


@dataclass(frozen=True, slots=True)
class MXFP4Parameters:
    """The names and dtypes of the packed values and the exponents."""

    packed_name: str
    packed_dtype: str
    scale_name: str
    scale_dtype: str


class MXFP4:
    """MXFP4, one matrix a module."""

    name = "mxfp4"
    parameters_type: type = MXFP4Parameters

    def detect(self, module: str, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> ModuleFormat | None:
        """Values in bytes beside exponents in bytes."""
        for packed, packed_dtype, scale, scale_dtype in LAYOUTS:
            info, found = tensors.get(packed), tensors.get(scale)
            if not info or not found or (info.dtype, found.dtype) != (packed_dtype, scale_dtype):
                continue
            if packed_dtype == "U8":  # DeepSeek's config speaks of its FP8 weights only
                claimed(module, "float4", "MXFP4", config)
            parameters = MXFP4Parameters(packed, packed_dtype, scale, scale_dtype)
            shape = info.shape[0], info.shape[-1] * 2
            check_tensors(module, tensors, self.tensors(parameters, shape), self.label(parameters))
            return ModuleFormat(self.name, parameters, shape)
        return None

    def tensors(self, parameters: MXFP4Parameters, shape: Shape) -> dict[str, TensorSpec]:
        """The packed values and their exponents."""
        rows, columns = shape
        p, group = parameters, Axis("in", GROUP_SIZE)
        return {
            p.packed_name: TensorSpec((p.packed_dtype,), (rows, math.ceil(columns / 2)), (Axis("out"), Axis("in", 2))),
            p.scale_name: TensorSpec((p.scale_dtype,), (rows, group.length(columns)), (Axis("out"), group)),
            "bias": bias_spec(rows),
        }

    def dequantize(
        self, tensors: Mapping[str, torch.Tensor], parameters: MXFP4Parameters, dtype: torch.dtype
    ) -> torch.Tensor:
        """Exact in float32; exponent 255 is NaN."""
        values = unpack_values(tensors[parameters.packed_name])
        return scale_groups(values, scale_values(tensors[parameters.scale_name]), GROUP_SIZE).to(dtype)

    def label(self, parameters: MXFP4Parameters) -> str:
        """`MXFP4`."""
        return "MXFP4"
