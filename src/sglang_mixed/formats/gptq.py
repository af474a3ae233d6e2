"""GPTQ: integers of 2, 3, 4 or 8 bits packed along `in`, with scales and zero points per group of input columns.

Layout of AutoGPTQ, GPTQModel and AutoRound (`auto_gptq` and its own `auto_round`): a little-endian bit stream in int32
words, so that 3-bit values straddle words (32 values in 3 words); qweight [in*bits/32, out], qzeros
[groups, out*bits/32], scales [groups, out], g_idx [in]. weight[o, i] = (q - zero[g_idx[i]]) * scale[g_idx[i]].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn, Protocol

import torch

from ..errors import FormatError, InconsistentFormatError
from .base import FLOAT_DTYPES, Axis, ModuleFormat, Shape, TensorInfo, TensorSpec, bias_spec, check_tensors
from .bit_stream import packing
from .bit_stream import unpack as unpack  # the kernels take it from here

#: The widths that GPTQ comes in, with their packing.
PACKING = {bits: packing(bits) for bits in (2, 3, 4, 8)}
#: checkpoint_format -> what to add to a stored zero point
ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}
_COMPARED_ROWS = 256


@dataclass(frozen=True, slots=True)
class GPTQParameters:
    """`group_size` is the actual one (= in where the config says -1); `zero_offset` is added to stored zeros (v1: 1).

    `zero_offset_known` is False where the config is no proof of it (`zero_offset_from` finds one). With `act_order` the
    groups of a column are known only from `g_idx`; without it they are consecutive. `num_groups` is given where a part
    of an act-order weight's columns keeps all groups of the whole.
    """

    bits: int
    group_size: int
    symmetric: bool
    act_order: bool
    has_g_idx: bool
    zero_offset: int
    scale_dtype: str
    num_groups: int | None = None
    zero_offset_known: bool = True


class GPTQ:
    """GPTQ, v1 and v2."""

    name = "gptq"
    parameters_type: type = GPTQParameters

    def detect(self, module: str, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> ModuleFormat | None:
        """`qweight`, `qzeros` and `scales` where scales are as wide as qweight (AWQ's are wider)."""
        if not is_gptq_layout(tensors) or not _is_read(config):
            return None
        bits = _bits(module, config)
        shape = _shape(module, tensors, bits)
        parameters = _parameters(config, bits, shape, tensors)
        _check_sizes(module, tensors, parameters, shape)
        if parameters.act_order and not parameters.has_g_idx:
            raise InconsistentFormatError(
                "config.json says desc_act, and there is no g_idx",
                tensor=f"{module}.g_idx",
                rule="with desc_act only g_idx tells the group of an input column",
                remedy="export the checkpoint again, or map this module to another source",
            )
        check_tensors(module, tensors, self.tensors(parameters, shape), self.label(parameters))
        return ModuleFormat(self.name, parameters, shape)

    def tensors(self, parameters: GPTQParameters, shape: Shape) -> dict[str, TensorSpec]:
        """`qweight`, `qzeros`, `scales`, and `g_idx` where the file has one."""
        rows, columns = shape
        packed_out, packed_in = (Axis(role, *PACKING[parameters.bits]) for role in ("out", "in"))
        groups = parameters.num_groups or math.ceil(columns / parameters.group_size)
        # With act-order a column's group may lie anywhere: a cut along `in` keeps all groups.
        group = Axis(None) if parameters.act_order else Axis("in", parameters.group_size)
        specs = {
            "qweight": TensorSpec(("I32",), (packed_in.length(columns), rows), (packed_in, Axis("out"))),
            "qzeros": TensorSpec(("I32",), (groups, packed_out.length(rows)), (group, packed_out)),
            "scales": TensorSpec((parameters.scale_dtype,), (groups, rows), (group, Axis("out"))),
            "bias": bias_spec(rows),
        }
        if parameters.has_g_idx:
            specs["g_idx"] = TensorSpec(("I32",), (columns,), (Axis("in"),))
        return specs

    def dequantize(
        self, tensors: Mapping[str, torch.Tensor], parameters: GPTQParameters, dtype: torch.dtype
    ) -> torch.Tensor:
        """(q - zero) x scale in float32; a v1 zero point may be 2**bits, it does not wrap to 0."""
        codes = unpack(tensors["qweight"], parameters.bits)
        scales = tensors["scales"].to(torch.float32)
        zeros = unpack(tensors["qzeros"], parameters.bits, 1)[:, : scales.shape[1]]
        known = parameters.zero_offset_known
        zeros = zeros.to(torch.int16) + (
            parameters.zero_offset if known else zero_offset_from(None, tensors, parameters)
        )
        groups = group_index(tensors.get("g_idx"), parameters, codes.shape[0], scales.shape[0])
        weight = (codes.to(torch.int16) - zeros[groups]).to(torch.float32) * scales[groups]
        return weight.T.contiguous().to(dtype)

    def label(self, parameters: GPTQParameters) -> str:
        """`GPTQ int4 g128`, with `asym` and `act-order` where they apply."""
        notes = ("" if parameters.symmetric else " asym") + (" act-order" if parameters.act_order else "")
        return f"GPTQ int{parameters.bits} g{parameters.group_size}{notes}"


class Grouped(Protocol):
    """What parameters of formats with groups of input columns have in common."""

    @property
    def group_size(self) -> int: ...  # noqa: D102
    @property
    def act_order(self) -> bool: ...  # noqa: D102


def group_index(g_idx: torch.Tensor | None, parameters: Grouped, columns: int, num_groups: int) -> torch.Tensor:
    """int64 [in]: each input column's group, from `g_idx` where there is one (it must not contradict desc_act)."""
    consecutive = torch.arange(columns, device=None if g_idx is None else g_idx.device) // parameters.group_size
    if g_idx is None:
        return consecutive
    groups = g_idx.to(torch.int64)
    low, high = (int(end) for end in groups.aminmax()) if columns else (0, 0)
    if low < 0 or high >= num_groups:
        raise InconsistentFormatError(
            f"g_idx has values from {low} to {high}",
            tensor="g_idx",
            rule=f"scales has {num_groups} groups",
            remedy="download the checkpoint again",
        )
    if not parameters.act_order and not torch.equal(groups, consecutive.to(groups.device)):
        raise InconsistentFormatError(
            "config.json's desc_act denies what g_idx says",
            tensor="g_idx",
            rule=f"without desc_act column i is in group i // {parameters.group_size}",
            remedy='set "desc_act": true in quantization_config if the quantizer used act-order',
        )
    return groups


def is_gptq_layout(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether qweight and scales are both as wide as `out` (in AWQ only scales is)."""
    if not {"qweight", "qzeros", "scales"} <= tensors.keys():
        return False
    qweight, scales = tensors["qweight"], tensors["scales"]
    return qweight.dtype == "I32" and len(qweight.shape) == len(scales.shape) == 2 and qweight[1][1] == scales[1][1]


def zero_offset_from(
    reference: torch.Tensor | None, tensors: Mapping[str, torch.Tensor], parameters: GPTQParameters
) -> int:
    """What to add to stored zero points, where the config does not tell.

    (AutoRound 0.15.1 writes both kinds as `auto_round`: of model-free exports the tag is wrong.) Symmetric zero points
    show it themselves; of others the reading near `reference` is right, the first rows or all of the weight [out, in]
    before it was quantized. Raises FormatError where neither shows it.
    """
    rows, middle = tensors["scales"].shape[1], 1 << (parameters.bits - 1)
    stored = unpack(tensors["qzeros"], parameters.bits, 1)[:, :rows]
    if parameters.symmetric:
        offsets = [offset for offset in (0, 1) if bool((stored == middle - offset).all())]
        return (
            offsets[0] if offsets else _refuse_zero_points("symmetric weights have other zero points than the middle")
        )
    if reference is None:
        return _refuse_zero_points("config.json does not tell whether zero points are stored as they are or less one")
    near = reference[: rows // 32 * 32 or rows][:_COMPARED_ROWS].to(torch.float32)
    errors = []
    for offset in (0, 1):
        part = {name: one[..., : _columns(name, len(near), parameters.bits)] for name, one in tensors.items()}
        read = GPTQ().dequantize(part, replace(parameters, zero_offset=offset, zero_offset_known=True), torch.float32)
        errors.append(float((read - near).norm()))
    best = min((0, 1), key=errors.__getitem__)
    # The wrong reading is off by a whole step where the right one is off by a third of one.
    if not 1.5 * errors[best] < errors[1 - best]:
        return _refuse_zero_points(
            f"read either way the weight is far from the original ({errors[0]:.3g}, {errors[1]:.3g})"
        )
    return best


def _columns(name: str, rows: int, bits: int) -> int | None:
    """How much of a tensor's last dimension `rows` outputs take."""
    return {"qweight": rows, "scales": rows, "qzeros": Axis("out", *packing(bits)).length(rows)}.get(name)


def _refuse_zero_points(what: str) -> NoReturn:
    raise FormatError(
        what,
        tensor="qzeros",
        rule="AutoRound stores zero points in two ways under one packing_format; only the original weights tell which",
        remedy="make the 16-bit original the default source of the map, or export again with format auto_gptq",
    )


def _is_read(config: Mapping[str, Any]) -> bool:
    """Whether what the config calls the packing is GPTQ's, of either kind."""
    if config.get("quant_method") == "auto-round":
        packing_format = str(config.get("packing_format") or "auto_round").rpartition(":")[2]
        return packing_format in ("auto_round", "auto_gptq", "gptq", "gptqmodel", "exllamav2", "triton")
    return (config.get("checkpoint_format") or "gptq") in ZERO_OFFSETS


def _zero_offset(config: Mapping[str, Any]) -> tuple[int, bool]:
    """What to add to stored zero points (v1: 1, v2: 0), and whether the config is proof of it."""
    if "zero_offset" in config:  # an exported mix, which was proven when it was planned
        return int(config["zero_offset"]), True
    if config.get("quant_method") == "auto-round":
        return (1, True) if "auto_gptq" in str(config.get("packing_format")) else (0, False)
    return ZERO_OFFSETS[config.get("checkpoint_format") or "gptq"], True


def _bits(module: str, config: Mapping[str, Any]) -> int:
    method, bits = config.get("quant_method", "gptq"), config.get("bits")
    if method in ("gptq", "auto-round") and bits in PACKING:
        return int(bits)
    raise InconsistentFormatError(
        f"the tensors are GPTQ's; config.json says quant_method {method!r}, bits {bits!r}",
        tensor=f"{module}.qweight",
        rule=f"GPTQ needs bits of {', '.join(map(str, PACKING))} in quantization_config",
        remedy="put the quantizer's quantize_config.json into config.json as quantization_config",
    )


def _shape(module: str, tensors: Mapping[str, TensorInfo], bits: int) -> Shape:
    num_values, num_words = PACKING[bits]
    rows, out = tensors["qweight"].shape
    if rows % num_words:
        raise InconsistentFormatError(
            f"config.json says {bits} bits; qweight has {rows} rows",
            tensor=f"{module}.qweight",
            rule=f"{bits} bits: {num_values} values in {num_words} rows",
            remedy="correct bits in quantization_config",
        )
    return out, rows // num_words * num_values


def _parameters(
    config: Mapping[str, Any], bits: int, shape: Shape, tensors: Mapping[str, TensorInfo]
) -> GPTQParameters:
    columns = shape[1]
    said = config.get("group_size")
    group = said if isinstance(said, int) and 0 < said <= columns else columns
    scale_dtype = tensors["scales"].dtype
    zero_offset, known = _zero_offset(config)
    return GPTQParameters(
        bits,
        group,
        symmetric=bool(config.get("sym", True)),
        act_order=bool(config.get("desc_act", False)) and group < columns,
        has_g_idx="g_idx" in tensors,
        zero_offset=zero_offset,
        zero_offset_known=known,
        scale_dtype=scale_dtype if scale_dtype in FLOAT_DTYPES else FLOAT_DTYPES[0],
    )


def _check_sizes(module: str, tensors: Mapping[str, TensorInfo], parameters: GPTQParameters, shape: Shape) -> None:
    out, columns = shape
    bits, group = parameters.bits, parameters.group_size
    qweight, qzeros, scales = (tensors[name].shape for name in ("qweight", "qzeros", "scales"))
    g_idx = tensors["g_idx"].shape if "g_idx" in tensors else (columns,)
    said = f"config.json says {bits} bits"
    zero_columns = Axis("out", *PACKING[bits]).length(out)
    problem = None
    if g_idx != (columns,):
        problem = f"{said}: qweight {list(qweight)} then has {qweight[0]} x 32 / {bits} = {columns} inputs"
        problem += f"; g_idx has {math.prod(g_idx)}, which makes {_guess(qweight[0], math.prod(g_idx))} bits"
    elif len(qzeros) != 2 or qzeros[1] != zero_columns:
        problem = f"{said}: {out} outputs then take {out} x {bits} / 32 = {zero_columns} columns of qzeros"
        problem += f"; qzeros {list(qzeros)} makes {_guess(qzeros[-1] if qzeros else 0, out)} bits"
    elif scales[0] != math.ceil(columns / group):
        problem = f"config.json says groups of {group}: {columns} inputs make {math.ceil(columns / group)} groups"
        problem += f"; scales {list(scales)} has {scales[0]}"
    if problem:
        rule = "qweight rows = in x bits / 32, qzeros columns = out x bits / 32, scales rows = in / group_size"
        remedy = "correct bits and group_size in quantization_config (or the module's entry in dynamic)"
        raise InconsistentFormatError(problem, tensor=f"{module}.qweight", rule=rule, remedy=remedy)


def _guess(words: int, values: int) -> str:
    return f"{words * 32 / values:g}" if values else "no"
