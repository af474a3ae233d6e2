"""What is refused, each with what is wrong, where, by which rule."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import packers
import pytest
import torch

from sglang_mixed.errors import FormatError, InconsistentFormatError, UnknownFormatError
from sglang_mixed.formats import TensorInfo, detect, get_format

NAME = "model.layers.0.mlp.down_proj"
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
CT = {"quant_method": "compressed-tensors"}


def infos(**tensors: tuple[str, list[int]]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(dtype, tuple(shape)) for name, (dtype, shape) in tensors.items()}


def gptq(**changed: tuple[str, list[int]]) -> dict[str, TensorInfo]:
    """4 bits, groups of 32, weight [64, 128]."""
    usual = {"qweight": ("I32", [16, 64]), "qzeros": ("I32", [4, 8]), "scales": ("F16", [4, 64])}
    return infos(**{**usual, "g_idx": ("I32", [128]), **changed})


def groups(*weights: dict[str, Any]) -> dict[str, Any]:
    return {**CT, "config_groups": {f"g{i}": {"targets": ["Linear"], "weights": one} for i, one in enumerate(weights)}}


INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
CHANNEL = {"num_bits": 8, "type": "float", "strategy": "channel"}
BLOCK = {"quant_method": "fp8", "weight_block_size": [128, 128]}

INCONSISTENT = {
    "bits against g_idx": (
        gptq(),
        {**GPTQ, "bits": 8},
        r"says 8 bits: qweight \[16, 64\].* 64 inputs; g_idx has 128.*4",
    ),
    "bits against qzeros": (
        {name: info for name, info in gptq().items() if name != "g_idx"},
        {**GPTQ, "bits": 8},
        r"64 x 8 / 32 = 16 columns of qzeros; qzeros \[4, 8\] makes 4 bits",
    ),
    "3 bits of 16 rows": (gptq(), {**GPTQ, "bits": 3}, r"3 bits; qweight has 16 rows.*32 values in 3 rows"),
    "group size": (gptq(), {**GPTQ, "group_size": 64}, r"128 inputs make 2 groups; scales \[4, 64\] has 4"),
    "no config": (gptq(), None, r"GPTQ's; config.json says quant_method 'gptq', bits None.*quantize_config.json"),
    "other method": (gptq(), {**GPTQ, "quant_method": "awq"}, r"GPTQ's; config.json says quant_method 'awq'"),
    "act-order without g_idx": (
        {name: info for name, info in gptq().items() if name != "g_idx"},
        {**GPTQ, "desc_act": True},
        r"desc_act, and there is no g_idx",
    ),
    "qzeros dtype": (gptq(qzeros=("I64", [4, 8])), GPTQ, r"dtype I64.*down_proj\.qzeros.*in I32"),
    "scales dtype": (gptq(scales=("F64", [4, 64])), GPTQ, r"dtype F64.*down_proj\.scales"),
    "foreign tensor": (
        gptq(extra=("F16", [1])),
        GPTQ,
        r"no place.*down_proj\.extra.*GPTQ int4 g32 consists of qweight",
    ),
    "no block size": (
        infos(weight=("F8_E4M3", [256, 256]), weight_scale_inv=("F32", [2, 2])),
        {"quant_method": "fp8"},
        r"scale of \[2, 2\].*weight_scale_inv.*per channel: \[256\] or \[256, 1\].*weight_block_size",
    ),
    "wrong blocks": (
        infos(weight=("F8_E4M3", [200, 256]), weight_scale_inv=("F32", [1, 2])),
        BLOCK,
        r"\[200, 256\] has a scale of \[1, 2\]; config.json denies it.*128x128: \[2, 2\] or \[2, 1, 2, 1\]",
    ),
    "two readings": (
        infos(weight=("F8_E4M3", [4, 4]), weight_scale=("F32", [4, 1])),
        groups(CHANNEL, {**CHANNEL, "strategy": "block", "block_structure": [1, 4]}),
        r"several readings.*per channel.*per block 1x4",
    ),
    "scale dtype": (infos(weight=("F8_E4M3", [4, 4]), weight_scale=("U8", [4])), None, r"dtype U8.*BF16 or F16 or F32"),
    "exponents without their type": (
        infos(weight=("F8_E4M3", [256, 256]), weight_scale_inv=("U8", [2, 2])),
        BLOCK,
        r"dtype U8.*FP8 128x128 has it in BF16 or F16 or F32",
    ),
    "rank": (infos(weight=("F8_E4M3", [2, 4, 4]), weight_scale=("F32", [1])), None, r"shape \[2, 4, 4\]"),
    "two scales": (
        infos(weight=("F8_E4M3", [4, 4]), weight_scale=("F32", [4]), weight_scale_inv=("F32", [4])),
        None,
        r"two scales.*weight_scale_inv and weight_scale",
    ),
    "int8 where config says int4": (
        infos(weight=("I8", [4, 4]), weight_scale=("F32", [4, 1])),
        groups(INT4),
        r"says int4 of this module's weight, the file holds I8",
    ),
    "block int8": (
        infos(weight=("I8", [256, 256]), weight_scale=("F32", [2, 2])),
        groups({"num_bits": 8, "type": "int", "strategy": "block", "block_structure": [128, 128]}),
        r"per block 128x128: not supported",
    ),
    "static without its scale": (
        infos(weight=("F8_E4M3", [4, 4]), weight_scale=("F32", [])),
        {"quant_method": "fp8", "activation_scheme": "static"},
        r"static activations, and input_scale is missing",
    ),
    "scale beside BF16": (
        infos(weight=("BF16", [4, 4]), weight_scale=("F32", [4])),
        None,
        r"beside a weight that is not",
    ),
    "not quantized, says dynamic": (
        gptq(),
        {**GPTQ, "dynamic": {r"-:.*down_proj": {}}},
        r"this module is not quantized",
    ),
    "not quantized, says ignore": (
        infos(weight=("F8_E4M3", [4, 4]), weight_scale=("F32", [4])),
        {**groups(CHANNEL), "ignore": [NAME]},
        r"this module is not quantized",
    ),
}


@pytest.mark.parametrize("case", INCONSISTENT)
def test_contradictions_are_refused(case: str) -> None:
    tensors, config, message = INCONSISTENT[case]
    with pytest.raises(InconsistentFormatError, match=f"(?s){message}") as caught:
        detect(NAME, tensors, config)
    assert caught.value.tensor is not None
    assert caught.value.tensor.startswith(NAME)
    assert caught.value.rule


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I8", "I32", "F8_E5M2"])
def test_a_bare_integer_weight_is_never_plain(dtype: str) -> None:
    with pytest.raises(FormatError, match=f"(?s)a {dtype} weight without a scale.*{NAME}.weight.*remedy"):
        detect(NAME, infos(weight=(dtype, [4, 4])), None)


def test_asymmetric_int8_is_refused() -> None:
    tensors = infos(weight=("I8", [4, 4]), weight_scale=("F32", [4]), weight_zero_point=("I8", [4]))
    with pytest.raises(FormatError, match=r"(?s)zero point.*weight_zero_point.*symmetric"):
        detect(NAME, tensors, None)


NOT_READ = {
    "AWQ in the layout 'gemv'": (
        infos(qweight=("I32", [64, 16]), qzeros=("I32", [64, 1]), scales=("F16", [64, 8])),
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "GEMV"},
    ),
    "AWQ in the layout 'gemv_fast'": (
        infos(qweight=("I16", [16, 128]), qzeros=("F16", [4, 64]), scales=("F16", [4, 64])),
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv_fast"},
    ),
    "compressed-tensors in format marlin-24": (
        infos(weight_packed=("I32", [4, 64]), scale_packed=("F16", [1, 64]), meta=("I16", [64, 8])),
        {**groups(INT4), "format": "marlin-24"},
    ),
    "ModelOpt's AWQ": (
        infos(
            weight=("U8", [64, 64]),
            weight_scale=("F8_E4M3", [64, 8]),
            weight_scale_2=("F32", []),
            pre_quant_scale=("BF16", [128]),
        ),
        {"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"},
    ),
    "AutoRound's packing_format 'mlx'": (gptq(), {**GPTQ, "quant_method": "auto-round", "packing_format": "mlx"}),
    "gptq ('gptq_p')": (gptq(), {**GPTQ, "checkpoint_format": "gptq_p"}),
    "MXFP4 with a layer's experts in one tensor": (
        infos(gate_up_proj_blocks=("U8", [4, 8, 2, 16]), gate_up_proj_scales=("U8", [4, 8, 2])),
        {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
    ),
    "bitsandbytes": (infos(weight=("I8", [4, 4]), SCB=("F32", [4])), {"quant_method": "bitsandbytes"}),
    "FP8 e5m2": (infos(weight=("F8_E5M2", [4, 4]), weight_scale=("F32", [4])), {"quant_method": "fp8"}),
}


@pytest.mark.parametrize("seen", NOT_READ)
def test_formats_known_by_sight_are_named(seen: str) -> None:
    tensors, config = NOT_READ[seen]
    with pytest.raises(
        UnknownFormatError, match=f"(?s){re.escape(seen)}.* recognised but not read: .*{NAME}.*gptq, awq"
    ):
        detect(NAME, tensors, config)


def test_unknown_tensors_are_listed() -> None:
    with pytest.raises(UnknownFormatError, match=r"no format explains these tensors: indices I64 \[4\]"):
        detect(NAME, infos(indices=("I64", [4])), None)
    with pytest.raises(UnknownFormatError, match="none"):
        detect(NAME, {}, None)


def test_g_idx_is_held_against_the_config_when_decoding() -> None:
    module = packers.gptq(np.random.default_rng(1), 32, 64, order="act")
    said = detect(NAME, module.infos, {**module.config, "desc_act": False})
    with pytest.raises(InconsistentFormatError, match="desc_act denies what g_idx says"):
        get_format("gptq").dequantize(module.tensors, said.parameters, torch.float32)


@pytest.mark.parametrize("value", [-1, 2])
def test_g_idx_out_of_range_is_refused(value: int) -> None:
    module = packers.gptq(np.random.default_rng(1), 32, 64, order="act")
    module.tensors["g_idx"][3] = value
    found = detect(NAME, module.infos, module.config)
    with pytest.raises(InconsistentFormatError, match=r"(?s)g_idx has values.*scales has 2 groups"):
        get_format("gptq").dequantize(module.tensors, found.parameters, torch.float32)
