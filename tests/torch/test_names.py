"""GPTQ tensors in hand, devices and masks: the helpers that the first users know."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sglang_mixed import (
    GPTQDequantizer,
    comprehensive_device_fix,
    create_proper_attention_mask,
    fix_moe_device_issues,
    validate_model_device_consistency,
)
from sglang_mixed.errors import InconsistentFormatError, UnsupportedError

from ..formats import packers

dequantize = GPTQDequantizer.dequantize_gptq_weight


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("order", ["none", "act"])
def test_gptq_weights_are_dequantized_exactly(bits: int, version: int, order: str) -> None:
    how = {"bits": bits, "group": 64, "sym": False, "order": order, "version": version}
    packed = packers.gptq(np.random.default_rng(0), 64, 256, **how)
    tensors = {name: packed.tensors[name] for name in ("qweight", "qzeros", "scales")}
    weight = dequantize(
        **tensors,
        g_idx=packed.tensors.get("g_idx"),
        bits=bits,
        group_size=64,
        checkpoint_format="gptq" if version == 1 else "gptq_v2",
    )
    assert weight.shape == (64, 256)
    assert torch.equal(weight, torch.as_tensor(packed.reference).float())


def historical() -> dict[str, torch.Tensor]:
    """The shapes of the historical bug: "size of tensor a (96) must match tensor b (768)"."""
    generator = torch.Generator().manual_seed(0)
    return {
        "qweight": torch.randint(-(2**31), 2**31 - 1, (256, 768), dtype=torch.int32, generator=generator),
        "qzeros": torch.randint(-(2**31), 2**31 - 1, (16, 96), dtype=torch.int32, generator=generator),
        "scales": torch.rand(16, 768, generator=generator).half(),
    }


@pytest.mark.parametrize("said", [128, 64, 32, -1, 2048])
def test_the_group_size_is_taken_from_the_shapes(said: int) -> None:
    tensors = historical()
    weight = dequantize(**tensors, group_size=said)
    assert weight.shape == (768, 2048)
    row, column = 5, 300  # group 2, word 37 and its nibble 4; zero point of output 5: word 0, nibble 5
    code = (int(tensors["qweight"][37, row]) >> 16) & 15
    zero = ((int(tensors["qzeros"][2, 0]) >> 20) & 15) + 1
    assert float(weight[row, column]) == (code - zero) * float(tensors["scales"][2, row])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bits": 8}, r"at 8 bits 16 groups of 768 outputs take qzeros \[16, 768 x 8 / 32 = 192\]"),
        ({"bits": 3}, r"at 3 bits qweight's 256 rows are no multiple of 3"),
        ({"scales": torch.ones(15, 768)}, r"15 groups of 768 outputs take qzeros \[15,"),
        ({"scales": torch.ones(16, 700)}, r"qweight has 768 outputs, scales 700"),
        ({"g_idx": torch.zeros(100, dtype=torch.int32)}, r"256 x 32 / 4 = 2048 inputs, g_idx 100"),
        ({"scales": torch.ones(15, 768), "qzeros": torch.zeros(15, 96, dtype=torch.int32)}, r"2048 / 15 is no whole"),
        ({"scales": torch.ones(768)}, "every one of them is a matrix"),
        ({"bits": 5}, "GPTQ of 5 bits"),
    ],
)
def test_shapes_that_cannot_be_are_one_error_with_the_arithmetic(changed: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(InconsistentFormatError, match=message):
        dequantize(**historical() | changed)


def test_gptq_weights_are_detected() -> None:
    weights = {f"layer.q_proj.{name}": tensor for name, tensor in historical().items()}
    weights |= {"layer.k_proj.weight": torch.ones(2, 2)}
    for name in ("layer.q_proj", "layer.q_proj.weight", "layer.q_proj.qweight"):
        assert GPTQDequantizer.is_gptq_weight(weights, name)
    assert not GPTQDequantizer.is_gptq_weight(weights, "layer.k_proj.weight")
    awq = packers.awq(np.random.default_rng(0), 128, 128).tensors
    assert not GPTQDequantizer.is_gptq_weight(
        {f"layer.q_proj.{name}": one for name, one in awq.items()}, "layer.q_proj"
    )


@pytest.mark.parametrize(
    ("ids", "mask"),
    [
        ([[9, 9, 5, 9, 6], [5, 6, 9, 9, 9]], [[0, 0, 1, 1, 1], [1, 1, 0, 0, 0]]),
        ([[5, 9, 6], [9, 9, 9]], [[1, 1, 1], [0, 0, 1]]),
        ([9, 5, 9], [0, 1, 0]),
    ],
)
def test_only_leading_and_trailing_padding_is_masked(ids: list, mask: list) -> None:  # type: ignore[type-arg]
    for tokenizer in (
        SimpleNamespace(pad_token_id=9, eos_token_id=9),
        SimpleNamespace(pad_token_id=None, eos_token_id=9),
    ):
        found = create_proper_attention_mask(torch.tensor(ids), tokenizer, "cpu")
        assert found.dtype == torch.int64 and found.tolist() == mask


def test_without_a_padding_token_nothing_is_masked() -> None:
    tokenizer = SimpleNamespace(pad_token_id=None, eos_token_id=None)
    assert create_proper_attention_mask(torch.tensor([[1, 2]]), tokenizer, "cpu").tolist() == [[1, 1]]


class Scattered(torch.nn.Module):
    """A tensor on another device in each place where one can be."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = torch.nn.Linear(2, 2, device="meta")
        self.register_buffer("table", torch.ones(2))
        self.scale = torch.ones(2)
        self.inner = torch.nn.Module()
        self.inner.offset = torch.ones(2, device="meta")


def test_tensors_elsewhere_are_named() -> None:
    found = validate_model_device_consistency(Scattered(), "cpu")
    assert not found["is_consistent"] and found["devices"] == {"meta": 3, "cpu": 2}
    named = [issue.split(" is on ")[0] for issue in found["issues"]]
    assert named == ["parameter experts.weight", "parameter experts.bias", "attribute inner.offset"]


def test_everything_is_taken_to_the_device() -> None:
    model, tokenizer = Scattered(), SimpleNamespace(pad_token_id=None, pad_token=None, eos_token="</s>")
    results = comprehensive_device_fix(model, tokenizer, "meta")
    assert results["model_fixed"] and results["tokenizer_fixed"] and len(results["issues_found"]) == 2
    assert not comprehensive_device_fix(model, None, "meta")["model_fixed"]
    assert results["validation"] == {
        "is_consistent": True,
        "issues": [],
        "devices": {"meta": 5},
        "expected_device": "meta",
    }
    assert tokenizer.pad_token == "</s>"


def test_what_has_no_values_cannot_be_moved() -> None:
    with pytest.raises(UnsupportedError, match="3 tensors are on the meta device"):
        fix_moe_device_issues(Scattered(), "cpu")
