"""NVFP4: e2m1 values with an e4m3 scale per 16 columns and one float32 scale per tensor.

Two layouts: compressed-tensors' `nvfp4-pack-quantized` (weight_packed uint8 [out, in/2], weight_scale [out, in/16],
weight_global_scale [1], by which is divided) and ModelOpt's (weight, weight_scale, weight_scale_2 [], multiplied).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .base import FLOAT_DTYPES, Axis, ModuleFormat, Shape, TensorInfo, TensorSpec, bias_spec, check_tensors
from .fp4 import scale_groups, unpack_values
from .scaled import claimed

GROUP_SIZE = 16
#: Layout -> names of the packed values, the tensor's scale, and the scale of static activations.
LAYOUTS = {
    "compressed-tensors": ("weight_packed", "weight_global_scale", "input_global_scale"),
    "modelopt": ("weight", "weight_scale_2", "input_scale"),
}


@dataclass(frozen=True, slots=True)
class NVFP4Parameters:
    """`global_scale` and `input_scale` are (dtype, shape) as stored; without an `input_scale` it is weight only."""

    layout: str  # a key of LAYOUTS
    global_scale: tuple[str, Shape]
    input_scale: tuple[str, Shape] | None = None


class NVFP4:
    """NVFP4."""

    name = "nvfp4"
    parameters_type: type = NVFP4Parameters

    def detect(self, module: str, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> ModuleFormat | None:
        """U8 values beside F8_E4M3 scales."""
        scale = tensors.get("weight_scale")
        for layout, (packed, whole, inputs) in LAYOUTS.items():
            info = tensors.get(packed)
            if info is None or scale is None or (info.dtype, scale.dtype) != ("U8", "F8_E4M3") or whole not in tensors:
                continue
            if "pre_quant_scale" in tensors:  # ModelOpt's NVFP4_AWQ
                return None
            claimed(module, "float4", "NVFP4", config)
            static = tensors.get(inputs)
            parameters = NVFP4Parameters(layout, _plain(tensors[whole]), _plain(static) if static else None)
            shape = info.shape[0], info.shape[-1] * 2
            check_tensors(module, tensors, self.tensors(parameters, shape), self.label(parameters))
            return ModuleFormat(self.name, parameters, shape)
        return None

    def tensors(self, parameters: NVFP4Parameters, shape: Shape) -> dict[str, TensorSpec]:
        """The packed values, `weight_scale`, the tensor's scale, and the inputs' where the file has one."""
        rows, columns = shape
        packed, whole, inputs = LAYOUTS[parameters.layout]
        specs = {
            packed: TensorSpec(("U8",), (rows, math.ceil(columns / 2)), (Axis("out"), Axis("in", 2))),
            "weight_scale": TensorSpec(
                ("F8_E4M3",), (rows, math.ceil(columns / GROUP_SIZE)), (Axis("out"), Axis("in", GROUP_SIZE))
            ),
            whole: _scalar(*parameters.global_scale),
            "bias": bias_spec(rows),
        }
        if parameters.input_scale:
            specs[inputs] = _scalar(*parameters.input_scale)
        return specs

    def dequantize(
        self, tensors: Mapping[str, torch.Tensor], parameters: NVFP4Parameters, dtype: torch.dtype
    ) -> torch.Tensor:
        """Value x group scale is exact in float32, so the result is rounded once, by the tensor's scale.

        Engines round twice (they scale the group scale first), which differs by at most a unit in the last place.
        """
        packed, whole, _ = LAYOUTS[parameters.layout]
        values = scale_groups(unpack_values(tensors[packed]), tensors["weight_scale"].to(torch.float32), GROUP_SIZE)
        scale = tensors[whole].to(torch.float32)
        return (values / scale if parameters.layout == "compressed-tensors" else values * scale).to(dtype)

    def label(self, parameters: NVFP4Parameters) -> str:
        """`NVFP4`."""
        return "NVFP4"


def _plain(info: TensorInfo) -> tuple[str, Shape]:
    return info.dtype, tuple(info.shape)


def _scalar(dtype: str, shape: Shape) -> TensorSpec:
    """One number, stored with no dimension or with one of length 1."""
    one = dtype if dtype in FLOAT_DTYPES else "F32"
    return TensorSpec((one,), shape if shape in ((), (1,)) else (1,), (Axis(None),) * min(len(shape), 1))
