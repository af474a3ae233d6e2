"""Configs as published checkpoints have them, with the tensors that come with them: each is read as what it is."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_mixed.errors import FormatError
from sglang_mixed.formats import Detector, TensorInfo, get_format

Infos = dict[str, TensorInfo]
OUT, IN = 512, 1024
Q, GATE = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate"


def infos(**tensors: tuple[str, list[int]]) -> Infos:
    return {name: TensorInfo(dtype, tuple(shape)) for name, (dtype, shape) in tensors.items()}


def gptq(bits: int, group: int, **more: tuple[str, list[int]]) -> Infos:
    words, groups = bits * OUT // 32, IN // group
    packed = infos(qweight=("I32", [IN * bits // 32, OUT]), qzeros=("I32", [groups, words]))
    return packed | infos(scales=("F16", [groups, OUT]), g_idx=("I32", [IN]), **more)


AWQ = infos(qweight=("I32", [IN, OUT // 8]), qzeros=("I32", [IN // 128, OUT // 8]), scales=("F16", [IN // 128, OUT]))
FP8 = infos(weight=("F8_E4M3", [OUT, IN]))
BLOCKS = FP8 | infos(weight_scale_inv=("F32", [OUT // 128, IN // 128]))
STATIC = FP8 | infos(weight_scale=("F32", []), input_scale=("F32", []))
PACKED = infos(weight_packed=("I32", [OUT, IN // 8]), weight_scale=("BF16", [OUT, IN // 128]))
NVFP4 = infos(weight_packed=("U8", [OUT, IN // 2]), weight_scale=("F8_E4M3", [OUT, IN // 16]))
MODELOPT = infos(weight=("U8", [OUT, IN // 2]), weight_scale=("F8_E4M3", [OUT, IN // 16]), weight_scale_2=("F32", []))


def group(weights: dict[str, Any], inputs: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    usual = {"block_structure": None, "dynamic": False, "observer": "minmax", "observer_kwargs": {}, "symmetric": True}
    scheme = {"weights": {**usual, **weights}, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {**scheme, "targets": ["Linear"]}},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "global_compression_ratio": 1.9,
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        **more,
    }


INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "actorder": "weight"}
FLOAT8 = {"num_bits": 8, "type": "float"}
FLOAT4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
TOKEN = {**FLOAT8, "strategy": "token", "dynamic": True}
CACHE = {**FLOAT8, "strategy": "tensor", "dynamic": False, "symmetric": True}

#: What -> (quantization_config, the tensors of a quantized module, its label).
PUBLISHED: dict[str, tuple[dict[str, Any], Infos, str]] = {
    "Qwen GPTQ-Int4": (
        {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": 128,
            "desc_act": False,
            "sym": True,
            "static_groups": False,
            "true_sequential": True,
            "damp_percent": 0.01,
            "modules_in_block_to_quantize": None,
            "exllama_config": {"version": 1},
            "use_exllama": True,
            "model_file_base_name": "model",
        },
        gptq(4, 128, bias=("F16", [OUT])),
        "GPTQ int4 g128",
    ),
    "GPTQModel with dynamic rules": (
        {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": 128,
            "checkpoint_format": "gptq",
            "desc_act": False,
            "sym": True,
            "lm_head": False,
            "pack_dtype": "int32",
            "dynamic": {"-:.*mlp.gate$": {}, "+:.*q_proj$": {"bits": 8, "group_size": 32}},
            "meta": {"quantizer": ["gptqmodel:4.0.0"]},
        },
        gptq(8, 32),
        "GPTQ int8 g32",
    ),
    "Qwen AWQ": (
        {
            "quant_method": "awq",
            "backend": "autoawq",
            "bits": 4,
            "group_size": 128,
            "version": "gemm",
            "zero_point": True,
            "do_fuse": False,
            "modules_to_not_convert": None,
        },
        AWQ | infos(bias=("F16", [OUT])),
        "AWQ int4 g128",
    ),
    "AWQ that leaves out gates by a part of their names": (
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": 128,
            "version": "gemm",
            "modules_to_not_convert": ["q", "gate"],
        },
        AWQ,
        "AWQ int4 g128",
    ),
    "AutoAWQ's quant_config.json": (
        {"quant_method": "awq", "zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"},
        AWQ,
        "AWQ int4 g128",
    ),
    "AutoRound's auto_round:auto_awq": (
        {
            "quant_method": "auto-round",
            "packing_format": "auto_round:auto_awq",
            "bits": 4,
            "group_size": 128,
            "sym": False,
            "data_type": "int",
            "extra_config": {GATE: {"bits": 16, "data_type": "fp"}},
        },
        AWQ,
        "AWQ int4 g128",
    ),
    "Qwen FP8": (
        {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate", "model.layers.0.input_layernorm"],
        },
        BLOCKS,
        "FP8 128x128",
    ),
    "DeepSeek V3.1": (
        {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "scale_fmt": "ue8m0",
            "weight_block_size": [128, 128],
        },
        BLOCKS,
        "FP8 128x128",
    ),
    "DeepSeek with e8m0 scales": (
        {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]},
        FP8 | infos(scale=("F8_E8M0", [OUT // 128, IN // 128])),
        "FP8 128x128",
    ),
    "DeepSeek's FP4 experts": (
        {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]},
        infos(weight=("I8", [OUT, IN // 2]), scale=("F8_E8M0", [OUT, IN // 32])),
        "MXFP4",
    ),
    "FP8 of the first quantizers, with the cache's scale": (
        {
            "quant_method": "fp8",
            "activation_scheme": "static",
            "ignored_layers": ["lm_head"],
            "kv_cache_scheme": "static",
        },
        STATIC | infos(kv_scale=("F32", [])),
        "FP8 tensor static",
    ),
    "Meta's fbgemm_fp8": (
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]},
        FP8 | infos(weight_scale=("F32", [OUT, 1])),
        "FP8 channel",
    ),
    "RedHatAI FP8-dynamic": (
        group({**FLOAT8, "strategy": "channel"}, TOKEN, format="float-quantized"),
        FP8 | infos(weight_scale=("BF16", [OUT, 1])),
        "FP8 channel",
    ),
    "RedHatAI FP8 with a quantized cache": (
        group({**FLOAT8, "strategy": "tensor"}, CACHE, format="float-quantized", kv_cache_scheme=CACHE),
        FP8 | infos(weight_scale=("BF16", [1]), input_scale=("BF16", [1])),
        "FP8 tensor static",
    ),
    "RedHatAI FP8 block": (
        group(
            {**FLOAT8, "strategy": "block", "block_structure": [128, 128]},
            {**FLOAT8, "strategy": "group", "group_size": 128, "dynamic": True},
            format="float-quantized",
        ),
        FP8 | infos(weight_scale=("BF16", [OUT // 128, IN // 128])),
        "FP8 128x128",
    ),
    "RedHatAI quantized.w4a16": (
        group(INT4, format="pack-quantized"),
        PACKED | infos(weight_shape=("I64", [2])),
        "CT int4 g128",
    ),
    "RedHatAI w4a16 in act-order": (
        group({**INT4, "actorder": "group"}, format="pack-quantized"),
        PACKED | infos(weight_shape=("I64", [2]), weight_g_idx=("I32", [IN])),
        "CT int4 g128 act-order",
    ),
    "asymmetric w4a16 (AWQ in llm-compressor)": (
        group({**INT4, "symmetric": False, "zp_dtype": "torch.int8"}, format="pack-quantized"),
        PACKED | infos(weight_shape=("I64", [2]), weight_zero_point=("I32", [OUT // 8, IN // 128])),
        "CT int4 g128 asym",
    ),
    "Kimi K2 Thinking": (
        group({**INT4, "group_size": 32, "actorder": None}, format="pack-quantized"),
        infos(weight_packed=("I32", [OUT, IN // 8]), weight_scale=("BF16", [OUT, IN // 32]), weight_shape=("I32", [2])),
        "CT int4 g32",
    ),
    "RedHatAI quantized.w8a16": (
        group({"num_bits": 8, "type": "int", "strategy": "channel", "group_size": -1}, format="pack-quantized"),
        infos(weight_packed=("I32", [OUT, IN // 4]), weight_scale=("BF16", [OUT, 1]), weight_shape=("I64", [2])),
        "CT int8 channel",
    ),
    "RedHatAI quantized.w8a8": (
        group({"num_bits": 8, "type": "int", "strategy": "channel"}, {**TOKEN, "type": "int"}, format="int-quantized"),
        infos(weight=("I8", [OUT, IN]), weight_scale=("BF16", [OUT, 1])),
        "INT8 channel",
    ),
    "RedHatAI NVFP4": (
        group(FLOAT4, {**FLOAT4, "dynamic": "local"}, format="nvfp4-pack-quantized"),
        NVFP4 | infos(weight_global_scale=("F32", [1]), input_global_scale=("F32", [1])),
        "NVFP4",
    ),
    "NVFP4A16": (
        group(FLOAT4, format="nvfp4-pack-quantized"),
        NVFP4 | infos(weight_global_scale=("F32", [1])),
        "NVFP4",
    ),
    "MXFP4 of llm-compressor": (
        group({**FLOAT4, "strategy": "group", "group_size": 32}, format="mxfp4-pack-quantized"),
        infos(weight_packed=("U8", [OUT, IN // 2]), weight_scale=("U8", [OUT, IN // 32])),
        "MXFP4",
    ),
    "NVIDIA FP8, hf_quant_config.json": (
        {
            "quant_method": "modelopt",
            "quant_algo": "FP8",
            "kv_cache_quant_algo": "FP8",
            "exclude_modules": ["lm_head", "model.layers.*.mlp.gate", "model.vision*"],
        },
        STATIC | infos(k_scale=("F32", [])),
        "FP8 tensor static",
    ),
    "NVIDIA FP8, config.json": (
        {
            "quant_method": "modelopt",
            "quant_algo": "FP8",
            "config_groups": {
                "group_0": {
                    "weights": {"dynamic": False, "num_bits": 8, "type": "float"},
                    "input_activations": {"dynamic": False, "num_bits": 8, "type": "float"},
                    "targets": ["Linear"],
                }
            },
            "ignore": ["lm_head", "model.layers.0.mlp.gate*"],
            "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
            "producer": {"name": "modelopt", "version": "0.35.0"},
        },
        STATIC,
        "FP8 tensor static",
    ),
    "NVIDIA FP8 with an affine cache": (
        {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_scheme": {"num_bits": 8, "type": "float"}},
        STATIC | infos(k_scale=("F32", []), k_bias=("BF16", [1, 2, 1, 64])),
        "FP8 tensor static",
    ),
    "NVIDIA NVFP4": (
        {
            "quant_method": "modelopt",
            "quant_algo": "NVFP4",
            "kv_cache_quant_algo": "FP8",
            "group_size": 16,
            "exclude_modules": ["lm_head", "model.layers.0.mlp.gate"],
        },
        MODELOPT | infos(input_scale=("F32", []), k_scale=("F32", [])),
        "NVFP4",
    ),
    "NVIDIA mixed": (
        {
            "quant_method": "modelopt",
            "quant_algo": "MIXED_PRECISION",
            "quantized_layers": {
                "model.layers.0.self_attn.o_proj": {"quant_algo": "FP8"},
                "model.layers.0.mlp.experts": {"quant_algo": "NVFP4", "group_size": 16},
            },
        },
        MODELOPT | infos(input_scale=("F32", [])),
        "NVFP4",
    ),
    "ModelOpt per channel": (
        {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
        FP8 | infos(weight_scale=("F32", [OUT])),
        "FP8 channel",
    ),
    "Quark FP8": (
        {
            "quant_method": "quark",
            "global_quant_config": {"weight": {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}},
            "exclude": ["lm_head"],
        },
        STATIC | infos(output_scale=("F32", [])),
        "FP8 tensor static",
    ),
}


@pytest.mark.parametrize("published", PUBLISHED)
def test_a_published_config_is_read(published: str) -> None:
    config, tensors, label = PUBLISHED[published]
    detector = Detector(config)
    found = detector(Q, tensors)
    assert found.shape == (OUT, IN)
    assert get_format(found.name).label(found.parameters) == label
    # What the config leaves in 16 bits, by whatever kind of name.
    assert detector(GATE, infos(weight=("BF16", [8, IN]))).name == "plain"
    assert detector("lm_head", infos(weight=("F16", [OUT, IN]))).name == "plain"


@pytest.mark.parametrize(
    "rotated",
    [
        {**group(INT4), "transform_config": {"config_groups": {"R1": {"type": "hadamard", "apply": []}}}},
        {"quant_method": "auto-round", "bits": 4, "rotation_config": {"block_size": 32}},
    ],
)
def test_rotated_weights_are_refused(rotated: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match=r"(?s)stored rotated.*without transforms"):
        Detector(rotated)


def test_a_rotation_of_nothing_is_none() -> None:
    config = {**group(INT4), "transform_config": {"config_groups": {}}}
    assert Detector(config)(Q, PACKED | infos(weight_shape=("I64", [2]))).name == "packed"


def test_groups_of_several_kinds_are_told_by_the_tensors() -> None:
    """llm-compressor's `mixed-precision` format: groups whose targets are classes alike."""
    config = group(INT4)
    config["config_groups"] |= group({**FLOAT8, "strategy": "channel"}, TOKEN)["config_groups"] | {
        "group_1": group(INT4)["config_groups"]["group_0"],
        "group_2": group(FLOAT4)["config_groups"]["group_0"],
    }
    detector = Detector({**config, "format": "mixed-precision"})
    assert detector(Q, PACKED | infos(weight_shape=("I64", [2]))).name == "packed"
    assert detector(Q, NVFP4 | infos(weight_global_scale=("F32", [1]))).name == "nvfp4"
    assert detector(Q, FP8 | infos(weight_scale=("F32", [OUT, 1]))).name == "fp8"
