"""compressed-tensors' `pack-quantized`: integers of 1 to 8 bits packed along `in`, scales per group, row or tensor.

weight_packed int32 [out, in*bits/32] is a little-endian bit stream in which values may straddle words (before release
0.15 only 2, 4 and 8 bits were packed like this). Codes are offset by 2^(bits-1), zero points too, which are packed
along `out`: weight_zero_point int32 [out*bits/32, groups]. weight_scale [out, groups]; weight_shape [2] repeats
[out, in]; weight_g_idx [in] tells columns' groups where actorder is "group" (up to release 0.18).
weight[o, i] = (code - zero[o, g(i)]) * scale[o, g(i)], with the zero point at 2^(bits-1) where there is none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import InconsistentFormatError
from .base import COPY_AGAIN, FLOAT_DTYPES, Axis, ModuleFormat, Shape, TensorInfo, TensorSpec, bias_spec, check_tensors
from .bit_stream import packing, unpack
from .gptq import group_index
from .schemes import Scheme, schemes

STRATEGIES = ("group", "channel", "tensor")


@dataclass(frozen=True, slots=True)
class PackedParameters:
    """`group_size` is the actual one (= in but for strategy "group"). The zero point of a tensor is an int8, unpacked.

    `num_groups` is given where a part of an act-order weight's columns keeps all groups of the whole.
    """

    bits: int
    strategy: str  # one of STRATEGIES
    group_size: int
    symmetric: bool
    act_order: bool
    scale_dtype: str
    shape_dtype: str = "I64"  # of weight_shape
    activations: str | None = None  # "dynamic" | "static" | None (weight only)
    num_groups: int | None = None


class Packed:
    """Packed integers of compressed-tensors."""

    name = "packed"
    parameters_type: type = PackedParameters

    def detect(self, module: str, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> ModuleFormat | None:
        """`weight_packed` in I32, read by the one of the config's groups that explains it."""
        packed = tensors.get("weight_packed")
        if packed is None or packed.dtype != "I32" or len(packed.shape) != 2 or "weight_scale" not in tensors:
            return None
        found: list[ModuleFormat] = []
        failures: list[InconsistentFormatError] = []
        for parameters, shape in _readings(module, tensors, config):
            try:
                check_tensors(module, tensors, self.tensors(parameters, shape), self.label(parameters))
                found.append(ModuleFormat(self.name, parameters, shape))
            except InconsistentFormatError as error:
                failures.append(error)
        if not found:
            raise failures[0]
        if len(set(found)) > 1:
            labels = " or ".join(self.label(one.parameters) for one in found)
            raise InconsistentFormatError(
                f"config.json allows several readings: {labels}",
                tensor=f"{module}.weight_packed",
                rule="one of config_groups tells how a module is packed",
                remedy="name the modules of each group in its targets",
            )
        return found[0]

    def tensors(self, parameters: PackedParameters, shape: Shape) -> dict[str, TensorSpec]:
        """`weight_packed`, `weight_scale`, `weight_shape`; `weight_zero_point` and `weight_g_idx` where there are."""
        (rows, columns), p = shape, parameters
        packed_out, packed_in = (Axis(role, *packing(p.bits)) for role in ("out", "in"))
        groups = p.num_groups or math.ceil(columns / p.group_size)
        # With act-order a column's group may lie anywhere: a cut along `in` keeps all groups.
        group = Axis(None) if p.act_order else Axis("in", p.group_size)
        specs = {"weight_packed": TensorSpec(("I32",), (rows, packed_in.length(columns)), (Axis("out"), packed_in))}
        if p.strategy == "tensor":
            specs["weight_scale"] = TensorSpec((p.scale_dtype,), (1,), (Axis(None),))
            zero = TensorSpec(("I8",), (1,), (Axis(None),))
        else:
            specs["weight_scale"] = TensorSpec((p.scale_dtype,), (rows, groups), (Axis("out"), group))
            zero = TensorSpec(("I32",), (packed_out.length(rows), groups), (packed_out, group))
        if not p.symmetric:
            specs["weight_zero_point"] = zero
        if p.act_order:
            specs["weight_g_idx"] = TensorSpec(("I32",), (columns,), (Axis("in"),))
        specs["weight_shape"] = TensorSpec((p.shape_dtype,), (2,), (Axis(None),))
        return {**specs, "bias": bias_spec(rows)}

    def dequantize(
        self, tensors: Mapping[str, torch.Tensor], parameters: PackedParameters, dtype: torch.dtype
    ) -> torch.Tensor:
        """(code - zero) x scale in float32."""
        p, scales = parameters, tensors["weight_scale"].to(torch.float32)
        columns = int(tensors["weight_shape"][1])
        codes = unpack(tensors["weight_packed"], p.bits, 1)
        if columns != codes.shape[1]:
            raise _not_whole_words(columns, codes.shape[1], p.bits)
        codes, zeros = codes.to(torch.int16), _zero_points(tensors.get("weight_zero_point"), p, scales)
        if p.strategy != "tensor":
            groups = group_index(tensors.get("weight_g_idx"), p, columns, scales.shape[1])
            zeros, scales = zeros[:, groups] if zeros.ndim else zeros, scales[:, groups]
        return ((codes - zeros).to(torch.float32) * scales).to(dtype).contiguous()

    def label(self, parameters: PackedParameters) -> str:
        """`CT int4 g128`, `CT int8 channel`, with `asym` and `act-order` where they apply."""
        p = parameters
        notes = ("" if p.symmetric else " asym") + (" act-order" if p.act_order else "")
        return f"CT int{p.bits} {f'g{p.group_size}' if p.strategy == 'group' else p.strategy}{notes}"


def _zero_points(stored: torch.Tensor | None, p: PackedParameters, scales: torch.Tensor) -> torch.Tensor:
    """int16 in the offset of the codes: [], or [out, groups]."""
    middle = 1 << (p.bits - 1)
    if stored is None:
        return torch.tensor(middle, dtype=torch.int16)
    if p.strategy == "tensor":
        return (stored.to(torch.int16) + middle).reshape(())
    return unpack(stored, p.bits)[: len(scales)].to(torch.int16)


def _readings(
    module: str, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]
) -> Iterator[tuple[PackedParameters, Shape]]:
    """What each claim of the config makes of the tensors."""
    claims = [claim for claim in schemes(config) or () if claim.kind.startswith("int") and claim.kind[3:].isdecimal()]
    claims = [claim for claim in claims if claim.granularity in STRATEGIES and 1 <= int(claim.kind[3:]) <= 8]
    if not claims:
        raise InconsistentFormatError(
            "the tensors are packed integers; config.json does not say how many bits and which groups",
            tensor=f"{module}.weight_packed",
            rule='config_groups has weights of type "int" with num_bits of 1 to 8, by group, channel or tensor',
            remedy="correct quantization_config in config.json, or map this module to another source",
        )
    for claim in claims:
        yield _reading(claim, tensors)


def _reading(claim: Scheme, tensors: Mapping[str, TensorInfo]) -> tuple[PackedParameters, Shape]:
    (rows, words), bits, scale = tensors["weight_packed"].shape, int(claim.kind[3:]), tensors["weight_scale"]
    values, unit = packing(bits)
    columns = words // unit * values
    group = claim.group_size if claim.granularity == "group" and claim.group_size else columns
    parameters = PackedParameters(
        bits,
        claim.granularity or "group",
        min(group, columns),
        claim.symmetric,
        claim.act_order and group < columns,
        scale.dtype if scale.dtype in FLOAT_DTYPES else FLOAT_DTYPES[0],
        "I32" if tensors.get("weight_shape", scale).dtype == "I32" else "I64",
        None if claim.activations == "none" else claim.activations,
    )
    return parameters, (rows, columns)


def _not_whole_words(columns: int, held: int, bits: int) -> InconsistentFormatError:
    return InconsistentFormatError(
        f"weight_shape says {columns} inputs; weight_packed holds {held}",
        tensor="weight_shape",
        rule=f"the inputs fill whole words ({packing(bits)[0]} values of {bits} bits)",
        remedy=COPY_AGAIN,
    )
