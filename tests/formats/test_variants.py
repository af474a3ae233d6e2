"""Single facts of the formats that a table of random weights would not pin."""

from __future__ import annotations

import numpy as np
import packers
import pytest
import torch

from sglang_mixed.errors import FormatError, InconsistentFormatError, UnknownFormatError
from sglang_mixed.formats import FORMATS, TensorInfo, detect, from_json, get_format, nbytes, register
from sglang_mixed.formats.gptq import unpack

RNG = np.random.default_rng(7)


def test_every_e4m3_code_decodes_exactly() -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(16, 16)
    tensors = {"weight": torch.from_numpy(codes).view(torch.float8_e4m3fn), "weight_scale": torch.tensor(0.3)}
    infos = {"weight": TensorInfo("F8_E4M3", (16, 16)), "weight_scale": TensorInfo("F32", ())}
    found = detect("m", infos, None)
    decoded = get_format("fp8").dequantize(tensors, found.parameters, torch.float32).numpy()
    expected = packers.e4m3(codes) * float(tensors["weight_scale"])
    np.testing.assert_array_equal(decoded, expected.astype(np.float32))
    assert np.isnan(decoded).sum() == 2


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_v1_zero_point_is_not_wrapped(bits: int) -> None:
    module = packers.gptq(RNG, 32, 32, bits=bits, sym=False)
    module.tensors["qzeros"].fill_(-1)
    module.tensors["scales"].fill_(1)
    found = detect("m", module.infos, module.config)
    decoded = get_format("gptq").dequantize(module.tensors, found.parameters, torch.float32)
    codes = unpack(module.tensors["qweight"], bits).T
    assert torch.equal(decoded, codes.to(torch.float32) - 2**bits)


def test_three_bit_values_straddle_words_as_gptqmodel_packs_them() -> None:
    # Values 0..7 repeated: bits 30..32 of the stream hold value 10 (= 2), 63..65 value 21 (= 5).
    words = packers.bit_stream(np.arange(32).reshape(32, 1) % 8, 3, 32)
    assert [word & 0xFFFFFFFF for word in words[:, 0].tolist()] == [0x88FAC688, 0xC688FAC6, 0xFAC688FA]
    assert unpack(torch.from_numpy(words.copy()), 3)[:, 0].tolist() == [value % 8 for value in range(32)]


def test_desc_act_with_one_group_is_no_act_order() -> None:
    module = packers.gptq(RNG, 32, 64, group=-1)
    found = detect("m", module.infos, {**module.config, "desc_act": True, "group_size": 128})
    assert (found.parameters.act_order, found.parameters.group_size) == (False, 64)


def test_autoround_gptq_export_is_v1() -> None:
    config = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4, "group_size": 32}
    found = detect("m", packers.gptq(RNG, 32, 64).infos, {**config, "sym": True, "data_type": "int"})
    assert (found.name, found.parameters.zero_offset) == ("gptq", 1)


def test_a_quantized_module_may_have_a_bias_which_is_not_counted() -> None:
    module = packers.gptq(RNG, 32, 64)
    bare = detect("m", module.infos, module.config)
    assert detect("m", {**module.infos, "bias": TensorInfo("BF16", (32,))}, module.config) == bare
    with pytest.raises(InconsistentFormatError, match=r"(?s)shape \[33\].*m\.bias.*\[32\]"):
        detect("m", {**module.infos, "bias": TensorInfo("BF16", (33,))}, module.config)


def test_plain_modules_take_any_names_and_mixed_dtypes() -> None:
    infos = {"weight": TensorInfo("BF16", (8, 4)), "e_score_correction_bias": TensorInfo("F32", (8,))}
    found = detect("model.layers.3.mlp.gate", infos, {"quant_method": "fp8", "weight_block_size": [128, 128]})
    assert found.parameters.names == ("e_score_correction_bias", "weight")
    specs = get_format("plain").tensors(found.parameters, found.shape)
    assert specs["e_score_correction_bias"].dtypes == ("F32",)
    assert specs["e_score_correction_bias"].axes[0].role == "out"
    assert nbytes(found) == 8 * 4 * 2 + 8 * 4
    assert nbytes(detect("a", {"sinks": TensorInfo("BF16", (64,))}, None)) == 128
    assert nbytes(detect("n", {"weight": TensorInfo("F32", (4,)), "bias": TensorInfo("F32", (4,))}, None)) == 16
    assert nbytes(detect("n", {"bias": TensorInfo("F32", (4,))}, None)) == 16


def test_the_registry_refuses_duplicates_and_lists_what_exists() -> None:
    with pytest.raises(FormatError, match="'gptq' is registered twice"):
        register("gptq", "elsewhere:Other")
    with pytest.raises(
        UnknownFormatError, match=r"(?s)did you mean 'gptq'.*gptq, awq, packed, fp8, int8, nvfp4, mxfp4, plain"
    ):
        get_format("gptp")
    for name in FORMATS:
        assert get_format(name) is get_format(name)
        assert get_format(name).name == name


@pytest.mark.parametrize("value", [{}, {"name": "fp8", "shape": [1, 1], "parameters": {"colour": 1}}, {"name": "fp8"}])
def test_a_foreign_json_is_refused(value: dict) -> None:
    with pytest.raises(FormatError, match="not a module's format"):
        from_json(value)
