"""AWQ: 4-bit integers packed along `out` in an interleaved order, with scales and zero points per group of inputs.

The GEMM layout of AutoAWQ, which GPTQModel and AutoRound (`auto_awq`) write too: qweight [in, out/8], qzeros
[groups, out/8], scales [groups, out]; bits 4j..4j+3 of word i are column 8i + ORDER[j].
weight[o, i] = (q - zero[i // group_size]) * scale[i // group_size]; stored zero points are the true ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import InconsistentFormatError
from .base import FLOAT_DTYPES, Axis, ModuleFormat, Shape, TensorInfo, TensorSpec, bias_spec, check_tensors
from .gptq import is_gptq_layout

BITS = 4
#: Nibble of a word -> column among the word's eight.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True, slots=True)
class AWQParameters:
    """`group_size` is the actual one (= in where the config says -1)."""

    bits: int
    group_size: int
    scale_dtype: str


class AWQ:
    """AWQ in the GEMM layout."""

    name = "awq"
    parameters_type: type = AWQParameters

    def detect(self, module: str, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> ModuleFormat | None:
        """`qweight`, `qzeros` and `scales` where scales are eight times as wide as qweight (GPTQ's are as wide)."""
        if not {"qweight", "qzeros", "scales"} <= tensors.keys() or is_gptq_layout(tensors):
            return None
        qweight, scales = tensors["qweight"], tensors["scales"]
        if qweight.dtype != "I32" or len(qweight.shape) != 2 or not is_gemm(config):
            return None
        _check_bits(module, config)
        shape = qweight.shape[1] * 8, qweight.shape[0]
        said = config.get("group_size", config.get("q_group_size"))
        group = said if isinstance(said, int) and 0 < said <= shape[1] else shape[1]
        scale_dtype = scales.dtype if scales.dtype in FLOAT_DTYPES else FLOAT_DTYPES[1]
        parameters = AWQParameters(BITS, group, scale_dtype)
        check_tensors(module, tensors, self.tensors(parameters, shape), self.label(parameters))
        return ModuleFormat(self.name, parameters, shape)

    def tensors(self, parameters: AWQParameters, shape: Shape) -> dict[str, TensorSpec]:
        """`qweight`, `qzeros`, `scales`."""
        rows, columns = shape
        groups, group, words = (
            math.ceil(columns / parameters.group_size),
            Axis("in", parameters.group_size),
            Axis("out", 8),
        )
        return {
            "qweight": TensorSpec(("I32",), (columns, words.length(rows)), (Axis("in"), words)),
            "qzeros": TensorSpec(("I32",), (groups, words.length(rows)), (group, words)),
            "scales": TensorSpec((parameters.scale_dtype,), (groups, rows), (group, Axis("out"))),
            "bias": bias_spec(rows),
        }

    def dequantize(
        self, tensors: Mapping[str, torch.Tensor], parameters: AWQParameters, dtype: torch.dtype
    ) -> torch.Tensor:
        """(q - zero) x scale in float32."""
        codes, zeros = (unpack_columns(tensors[name]).to(torch.int16) for name in ("qweight", "qzeros"))
        groups = torch.arange(len(codes), device=codes.device) // parameters.group_size
        weight = (codes - zeros[groups]).to(torch.float32) * tensors["scales"].to(torch.float32)[groups]
        return weight.T.contiguous().to(dtype)

    def label(self, parameters: AWQParameters) -> str:
        """`AWQ int4 g128`."""
        return f"AWQ int{parameters.bits} g{parameters.group_size}"


def unpack_columns(words: torch.Tensor) -> torch.Tensor:
    """int32 [n, m] -> uint8 [n, 8*m], each word's nibbles in the order of their columns."""
    codes = torch.empty((*words.shape, 8), dtype=torch.uint8, device=words.device)
    for nibble, column in enumerate(ORDER):
        codes[..., column] = (words >> (BITS * nibble)) & 15
    return codes.flatten(-2)


def is_gemm(config: Mapping[str, Any]) -> bool:
    """Whether the config allows the GEMM layout: GEMV, GEMV_FAST and Marlin ones look alike and are others."""
    if config.get("quant_method") == "auto-round":
        return "awq" in str(config.get("packing_format"))
    return layout_name(config) == "gemm"


def layout_name(config: Mapping[str, Any]) -> str:
    """What the config calls the layout: `version` of AutoAWQ, `checkpoint_format` or `format` of GPTQModel."""
    named = (config.get(key) for key in ("version", "checkpoint_format", "format"))
    return next((name.lower() for name in named if isinstance(name, str)), "gemm")


def _check_bits(module: str, config: Mapping[str, Any]) -> None:
    method, bits = config.get("quant_method", "awq"), config.get("bits", config.get("w_bit"))
    if method not in ("awq", "auto-round") or bits != BITS:
        raise InconsistentFormatError(
            f"the tensors are AWQ's; config.json says quant_method {method!r}, bits {bits!r}",
            tensor=f"{module}.qweight",
            rule="AWQ needs quant_method awq and bits (or w_bit) of 4 in quantization_config",
            remedy="put the quantizer's quant_config.json into config.json as quantization_config",
        )
