"""Symmetric INT8 weights with a scale per tensor or per row (compressed-tensors `int-quantized`, AutoRound W8A8)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .base import ModuleFormat, Shape, TensorInfo, TensorSpec, check_tensors
from .scaled import StaticScale, find_scaled, scaled_specs


@dataclass(frozen=True, slots=True)
class Int8Parameters:
    """weight = int8 [out, in] x scale; `scale_shape` is that of the whole module as stored."""

    granularity: str  # "tensor" | "channel"
    scale_name: str
    scale_dtype: str
    scale_shape: Shape
    activations: str | None = None  # "dynamic" | "static" | None (weight only)
    input_scale: StaticScale | None = None


class Int8:
    """Symmetric INT8."""

    name = "int8"
    parameters_type: type = Int8Parameters

    def detect(self, module: str, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> ModuleFormat | None:
        """An I8 `weight` beside a scale."""
        found = find_scaled(module, "int8", "I8", tensors, config)
        if found is None:
            return None
        scheme, granularity, name, dtype, scale_shape, static = found
        parameters = Int8Parameters(granularity, name, dtype, scale_shape, scheme.activations, static)
        shape = tuple(tensors["weight"].shape)
        check_tensors(module, tensors, self.tensors(parameters, shape), self.label(parameters))
        return ModuleFormat(self.name, parameters, shape)

    def tensors(self, parameters: Int8Parameters, shape: Shape) -> dict[str, TensorSpec]:
        """`weight`, its scale, and `input_scale` where activations are static."""
        return scaled_specs("I8", parameters, None, shape)

    def dequantize(
        self, tensors: Mapping[str, torch.Tensor], parameters: Int8Parameters, dtype: torch.dtype
    ) -> torch.Tensor:
        """int8 x scale in float32."""
        scale = tensors[parameters.scale_name].to(torch.float32)
        if parameters.granularity == "channel":
            scale = scale.reshape(-1, 1)
        return (tensors["weight"].to(torch.float32) * scale).to(dtype)

    def label(self, parameters: Int8Parameters) -> str:
        """`INT8 channel`, `INT8 tensor static`."""
        return f"INT8 {parameters.granularity}{' static' if parameters.activations == 'static' else ''}"
