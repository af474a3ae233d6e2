"""What FP8 and INT8 share: one 8-bit `weight` [out, in] beside one scale per tensor, per row or per block."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from ..errors import FormatError, InconsistentFormatError
from .base import FLOAT_DTYPES, Axis, Shape, TensorInfo, TensorSpec, bias_spec
from .schemes import Scheme, schemes

T = TypeVar("T")
SCALE_NAMES = ("weight_scale_inv", "weight_scale", "scale")
#: MXFP8's blocks, whose e8m0 scales are stored as bytes.
MX_BLOCK = (1, 32)
ZERO_POINTS = ("weight_zero_point", "weight_zp")
ANY = ("tensor", "channel")  # granularities that a scale's shape alone can tell

StaticScale = tuple[str, Shape]  # (dtype, shape) of `input_scale`


class ScaledParameters(Protocol):
    """What parameters of a scaled format have in common."""

    @property
    def granularity(self) -> str: ...  # noqa: D102
    @property
    def scale_name(self) -> str: ...  # noqa: D102
    @property
    def scale_dtype(self) -> str: ...  # noqa: D102
    @property
    def scale_shape(self) -> Shape: ...  # noqa: D102
    @property
    def input_scale(self) -> StaticScale | None: ...  # noqa: D102


class Scaled(NamedTuple):
    """A scaled weight as found: the proven granularity, block and activations, and its scales."""

    scheme: Scheme
    granularity: str
    name: str
    dtype: str
    shape: Shape
    static: StaticScale | None


def find_scaled(
    module: str, kind: str, code: str, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]
) -> Scaled | None:
    """The module's scaled weight of dtype `code`, checked against the config's claims of `kind`, if it has one."""
    weight = tensors.get("weight")
    if weight is None or weight.dtype != code or not (name := _scale_name(module, tensors)):
        return None
    if code == "I8" and tensors[name].dtype == "F8_E8M0":  # two FP4 values a byte
        return None
    if len(weight.shape) != 2:
        rule = "8-bit weights are [out, in]"
        raise InconsistentFormatError(f"a {code} weight of shape {list(weight.shape)}", tensor=module, rule=rule)
    scale, static = tensors[name], tensors.get("input_scale")
    candidates = claimed(module, kind, code, config)
    scheme = _proven(f"{module}.{name}", candidates, tuple(weight.shape), scale.shape)
    scheme = _with_activations(module, scheme, static is not None)
    assert scheme.granularity is not None
    static_scale = (static.dtype, tuple(static.shape)) if static else None
    return Scaled(scheme, scheme.granularity, name, scale.dtype, tuple(scale.shape), static_scale)


def scaled_specs(
    code: str, parameters: ScaledParameters, block: tuple[int, int] | None, shape: Shape
) -> dict[str, TensorSpec]:
    """`weight`, its scale, and `input_scale` where activations are static."""
    if block:
        axes = _block_shape(parameters.scale_shape, Axis("out", block[0]), Axis("in", block[1]), Axis(None))
    elif parameters.granularity == "channel":
        axes = (Axis("out"), Axis(None))[: len(parameters.scale_shape)]
    else:
        axes = (Axis(None),) * len(parameters.scale_shape)
    possible = FLOAT_DTYPES + (("F8_E8M0",) if block else ()) + (("U8",) if block == MX_BLOCK else ())
    scale_dtypes = (parameters.scale_dtype,) if parameters.scale_dtype in possible else FLOAT_DTYPES
    scale_shape = _scale_shape(parameters, block, shape)
    specs = {
        "weight": TensorSpec((code,), shape, (Axis("out"), Axis("in"))),
        parameters.scale_name: TensorSpec(scale_dtypes, scale_shape, axes),
        "bias": bias_spec(shape[0]),
    }
    if parameters.input_scale:
        dtype, static = parameters.input_scale
        specs["input_scale"] = TensorSpec((dtype,), static, (Axis(None),) * len(static))
    return specs


def scale_values(scale: torch.Tensor) -> torch.Tensor:
    """Scales as float32, whatever they are stored in; those of blocks as a matrix."""
    if scale.ndim == 4:
        scale = scale.squeeze(3).squeeze(1)
    return (scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale).to(torch.float32)


def _scale_shape(parameters: ScaledParameters, block: tuple[int, int] | None, shape: Shape) -> Shape:
    if block:
        return _block_shape(parameters.scale_shape, math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1]), 1)
    if parameters.granularity == "channel":
        return (shape[0], 1)[: len(parameters.scale_shape)]
    return parameters.scale_shape


def _block_shape(stored: Shape, rows: T, columns: T, one: T) -> tuple[T, ...]:
    """For a matrix of block scales, in which ModelOpt keeps two dimensions of length 1."""
    return (rows, one, columns, one) if len(stored) == 4 else (rows, columns)


def _scale_name(module: str, tensors: Mapping[str, TensorInfo]) -> str | None:
    found = [name for name in SCALE_NAMES if name in tensors]
    if len(found) > 1:
        rule = f"a weight has one of {' and '.join(found)}"
        raise InconsistentFormatError("a weight with two scales", tensor=f"{module}.weight", rule=rule)
    for zero in ZERO_POINTS:
        if found and zero in tensors:
            raise FormatError(
                "8-bit weights with a zero point are not supported",
                tensor=f"{module}.{zero}",
                rule="weight = integer x scale",
                remedy="export the checkpoint with symmetric weights, or map this module to another source",
            )
    return found[0] if found else None


def claimed(module: str, kind: str, code: str, config: Mapping[str, Any]) -> list[Scheme]:
    """The config's claims of this kind; any of them may be this module's. Raises where it claims other kinds only."""
    claims = schemes(config)
    if claims is None:
        return [Scheme(kind)]
    candidates = [claim for claim in claims if claim.kind == kind]
    if not candidates:
        said = ", ".join(sorted({claim.kind for claim in claims})) or "nothing"
        raise InconsistentFormatError(
            f"config.json says {said} of this module's weight, the file holds {code}",
            tensor=f"{module}.weight",
            rule="config.json must say of a quantized module what its tensors are",
            remedy="correct quantization_config in config.json, or map this module to another source",
        )
    return candidates


def _proven(tensor: str, candidates: list[Scheme], weight: Shape, scale: Shape) -> Scheme:
    # One claim may fit by two readings only where both mean the same (a scale of one value for one row).
    fits = dict.fromkeys(fit for claim in candidates for fit in _readings(claim) if scale in _shapes(fit, weight))
    if fits and (len(fits) == 1 or len(candidates) == 1):
        return next(iter(fits))
    found = f"weight {list(weight)} has a scale of {list(scale)}"
    raise InconsistentFormatError(
        f"{found}; config.json allows several readings" if fits else f"{found}; config.json denies it",
        tensor=tensor,
        rule="; ".join(_describe(fit, weight) for claim in candidates for fit in _readings(claim)),
        remedy="correct quantization_config in config.json (block scales need weight_block_size)",
    )


def _readings(claim: Scheme) -> list[Scheme]:
    return [claim] if claim.granularity else [replace(claim, granularity=one) for one in ANY]


def _shapes(scheme: Scheme, weight: Shape) -> tuple[Shape, ...]:
    if scheme.granularity == "tensor":
        return (), (1,), (1, 1)
    if scheme.granularity == "channel":
        return (weight[0],), (weight[0], 1)
    if scheme.granularity == "block" and scheme.block and scheme.kind == "float8":
        grid = math.ceil(weight[0] / scheme.block[0]), math.ceil(weight[1] / scheme.block[1])
        return grid, (grid[0], 1, grid[1], 1)
    return ()


def _describe(scheme: Scheme, weight: Shape) -> str:
    size = f" {scheme.block[0]}x{scheme.block[1]}" if scheme.block else ""
    shapes = " or ".join(str(list(shape)) for shape in _shapes(scheme, weight))
    return f"per {scheme.granularity}{size}: {shapes or 'not supported'}"


def _with_activations(module: str, scheme: Scheme, has_input_scale: bool) -> Scheme:
    said = scheme.activations
    if (said == "static") != has_input_scale and said is not None:
        raise InconsistentFormatError(
            f"config.json says {said} activations, and input_scale is {'there' if has_input_scale else 'missing'}",
            tensor=f"{module}.input_scale",
            rule="static activations have an input_scale, others have none",
            remedy="correct quantization_config in config.json, or export the checkpoint again",
        )
    found = said or ("static" if has_input_scale else "dynamic")
    return replace(scheme, activations=None if found == "none" else found)
