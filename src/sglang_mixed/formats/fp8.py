"""FP8 e4m3 weights with per-tensor, per-channel or block scales (OCP 8-bit floating point, `float8_e4m3fn`).

MXFP8 is among them: blocks of 1x32 with exponents in bytes as scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .base import ModuleFormat, Shape, TensorInfo, TensorSpec, check_tensors
from .scaled import StaticScale, find_scaled, scale_values, scaled_specs


@dataclass(frozen=True, slots=True)
class FP8Parameters:
    """weight = e4m3 [out, in] x scale (divided by it where `inverse`: GPTQModel's files store 1/scale).

    `scale_shape` is that of the whole module as stored; `input_scale` is (dtype, shape) of static activations' one.
    """

    granularity: str  # "tensor" | "channel" | "block"
    block: tuple[int, int] | None  # (rows, columns), the last ones may be ragged
    scale_name: str
    scale_dtype: str
    scale_shape: Shape
    inverse: bool = False
    activations: str | None = None  # "dynamic" | "static" | None (weight only)
    input_scale: StaticScale | None = None


class FP8:
    """FP8 e4m3."""

    name = "fp8"
    parameters_type: type = FP8Parameters

    def detect(self, module: str, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> ModuleFormat | None:
        """An F8_E4M3 `weight` beside a scale."""
        found = find_scaled(module, "float8", "F8_E4M3", tensors, config)
        if found is None:
            return None
        scheme, granularity, name, dtype, scale_shape, static = found
        parameters = FP8Parameters(
            granularity, scheme.block, name, dtype, scale_shape, scheme.inverse, scheme.activations, static
        )
        shape = tuple(tensors["weight"].shape)
        check_tensors(module, tensors, self.tensors(parameters, shape), self.label(parameters))
        return ModuleFormat(self.name, parameters, shape)

    def tensors(self, parameters: FP8Parameters, shape: Shape) -> dict[str, TensorSpec]:
        """`weight`, its scale, and `input_scale` where activations are static."""
        return scaled_specs("F8_E4M3", parameters, parameters.block, shape)

    def dequantize(
        self, tensors: Mapping[str, torch.Tensor], parameters: FP8Parameters, dtype: torch.dtype
    ) -> torch.Tensor:
        """e4m3 to float32 is exact, subnormals included; the NaN codes 0x7F and 0xFF stay NaN."""
        weight = tensors["weight"].to(torch.float32)
        scale = scale_values(tensors[parameters.scale_name])
        if parameters.granularity == "channel":
            scale = scale.reshape(-1, 1)
        elif parameters.block:
            rows, columns = parameters.block
            scale = scale.repeat_interleave(rows, 0)[: weight.shape[0]]
            scale = scale.repeat_interleave(columns, 1)[:, : weight.shape[1]]
        return (weight / scale if parameters.inverse else weight * scale).to(dtype)

    def label(self, parameters: FP8Parameters) -> str:
        """`FP8 128x128`, `FP8 channel`, `FP8 tensor static`."""
        kind = f"{parameters.block[0]}x{parameters.block[1]}" if parameters.block else parameters.granularity
        return f"FP8 {kind}{' static' if parameters.activations == 'static' else ''}"
