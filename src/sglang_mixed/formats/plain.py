"""Weights stored as they are: BF16, FP16, FP32 (or FP64), of any rank and any local name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import FormatError, InconsistentFormatError
from .base import FLOAT_DTYPES, Axis, ModuleFormat, Shape, TensorInfo, TensorSpec

DTYPES = frozenset((*FLOAT_DTYPES, "F64"))
#: Names that only a quantized module has; beside a float weight they mean a broken or half-converted export.
QUANTIZED_NAMES = frozenset(("weight_scale", "weight_scale_inv", "weight_zero_point", "qzeros"))


@dataclass(frozen=True, slots=True)
class PlainParameters:
    """`dtype` and `ModuleFormat.shape` are those of the main tensor: `weight`, or else the first of `names`.

    `names` are all local names, sorted; `others` holds (name, dtype, shape) of all but the main one, because a
    module may mix dtypes (a BF16 router `weight` with an F32 `e_score_correction_bias`).
    """

    dtype: str
    names: tuple[str, ...]
    others: tuple[tuple[str, str, Shape], ...] = ()


def main_name(names: tuple[str, ...]) -> str:
    """The local name whose dtype and shape stand for the module."""
    return "weight" if "weight" in names else names[0]


def without_bias(module_format: ModuleFormat) -> ModuleFormat:
    """The format without its bias, for whoever keeps that in a parameter of its own."""
    parameters = module_format.parameters
    if not isinstance(parameters, PlainParameters) or "bias" not in parameters.names:
        return module_format
    names = tuple(name for name in parameters.names if name != "bias")
    others = tuple(other for other in parameters.others if other[0] != "bias")
    return replace(module_format, parameters=PlainParameters(parameters.dtype, names, others))


class Plain:
    """Unquantized tensors."""

    name = "plain"
    parameters_type: type = PlainParameters

    def detect(self, module: str, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> ModuleFormat | None:
        """Any module whose tensors are all floats, whatever the checkpoint's config says of others."""
        if not tensors or not all(info.dtype in DTYPES for info in tensors.values()):
            _refuse_bare(module, tensors)
            return None
        stray = QUANTIZED_NAMES & tensors.keys()
        if stray:
            raise InconsistentFormatError(
                f"{', '.join(sorted(stray))} stands beside a weight that is not quantized",
                tensor=f"{module}.{min(stray)}",
                rule="only quantized weights have scales and zero points",
                remedy="export the checkpoint again, or map this module to another source",
            )
        names = tuple(sorted(tensors))
        main = main_name(names)
        others = tuple((name, tensors[name].dtype, tuple(tensors[name].shape)) for name in names if name != main)
        parameters = PlainParameters(tensors[main].dtype, names, others)
        return ModuleFormat(self.name, parameters, tuple(tensors[main].shape))

    def tensors(self, parameters: PlainParameters, shape: Shape) -> dict[str, TensorSpec]:
        """Main tensor [out, in] or [out]; of the others, vectors of length `out` follow it. Higher ranks stay whole."""
        rows = shape[0] if shape else None
        specs = {main_name(parameters.names): TensorSpec((parameters.dtype,), shape, _axes(shape, rows))}
        for name, dtype, other in parameters.others:
            axes = _axes(other, rows) if len(other) == 1 else (Axis(None),) * len(other)
            specs[name] = TensorSpec((dtype,), other, axes)
        return specs

    def dequantize(
        self, tensors: Mapping[str, torch.Tensor], parameters: PlainParameters, dtype: torch.dtype
    ) -> torch.Tensor:
        """The main tensor in `dtype`."""
        return tensors[main_name(parameters.names)].to(dtype)

    def label(self, parameters: PlainParameters) -> str:
        """`BF16`, `F16`, `F32`."""
        return parameters.dtype


def _axes(shape: Shape, rows: int | None) -> tuple[Axis, ...]:
    if len(shape) == 2:
        return Axis("out"), Axis("in")
    if len(shape) == 1 and shape[0] == rows:
        return (Axis("out"),)
    return (Axis(None),) * len(shape)


def _refuse_bare(module: str, tensors: Mapping[str, TensorInfo]) -> None:
    info = tensors.get("weight")
    lone = not any("scale" in name or name == "SCB" for name in tensors)
    if info is not None and info.dtype not in DTYPES and lone:
        raise FormatError(
            f"a {info.dtype} weight without a scale cannot be read",
            tensor=f"{module}.weight",
            rule="a weight that is not F16, BF16, F32 or F64 needs its scale beside it in the same checkpoint",
            remedy="complete the download (a shard or its index may be missing) or map this module to another source",
        )
