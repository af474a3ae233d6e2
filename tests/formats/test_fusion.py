"""Weights of one format stacked along their outputs decode to the stacked weight, and come apart byte for byte."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import packers
import pytest
import torch

from sglang_mixed.errors import InconsistentFormatError
from sglang_mixed.formats import ModuleFormat, detect, get_format, tensor_specs
from sglang_mixed.formats.fusion import fuse, out_axis, stack_common, unstack

Build = Callable[[np.random.Generator, int], packers.Packed]
FUSED: dict[str, Build] = {
    "GPTQ": lambda rng, out: packers.gptq(rng, out, 128, sym=False),
    "AWQ": lambda rng, out: packers.awq(rng, out, 128),
    "CT": lambda rng, out: packers.packed(rng, out, 128),
    "CT asym": lambda rng, out: packers.packed(rng, out, 128, sym=False),
    "CT channel": lambda rng, out: packers.packed(rng, out, 128, bits=8, strategy="channel"),
    "MXFP4": lambda rng, out: packers.mxfp4(rng, out, 128),
}
APART: dict[str, Build] = {
    "act-order": lambda rng, out: packers.gptq(rng, out, 128, order="act"),
    "CT act-order": lambda rng, out: packers.packed(rng, out, 128, act_order=True),
    "CT tensor": lambda rng, out: packers.packed(rng, out, 128, strategy="tensor"),
    "NVFP4": lambda rng, out: packers.nvfp4(rng, out, 128),
    "half a word of zero points": lambda rng, out: packers.packed(rng, out - 4, 128, sym=False),
}


def parts_of(build: Build) -> tuple[list[packers.Packed], list[ModuleFormat]]:
    modules = [build(np.random.default_rng(out), out) for out in (64, 32, 32)]
    return modules, [detect("m", module.infos, module.config) for module in modules]


def stack(modules: list[packers.Packed], parts: list[ModuleFormat]) -> dict[str, torch.Tensor]:
    axes = {local: out_axis(tensor_specs(parts[0])[local]) for local in modules[0].tensors}
    stacked = {
        local: torch.cat([module.tensors[local] for module in modules], axis)
        for local, axis in axes.items()
        if axis is not None
    }
    return {**stack_common([module.tensors for module in modules], parts), **stacked}


@pytest.mark.parametrize("name", FUSED)
def test_stacked_weights_decode_as_one_and_come_apart(name: str) -> None:
    modules, parts = parts_of(FUSED[name])
    fused = fuse(parts)
    assert fused is not None and fused.shape == (128, 128)
    stacked = stack(modules, parts)
    decoded = get_format(fused.name).dequantize(stacked, fused.parameters, torch.float32)
    expected = np.concatenate([module.reference for module in modules]).astype(np.float32)
    np.testing.assert_array_equal(decoded.numpy(), expected)
    for module, restored in zip(modules, unstack(stacked, parts), strict=True):
        assert module.tensors.keys() == restored.keys()
        for local, tensor in module.tensors.items():
            assert torch.equal(restored[local].contiguous().view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize("name", APART)
def test_what_each_part_has_of_its_own_keeps_them_apart(name: str) -> None:
    assert fuse(parts_of(APART[name])[1]) is None


def test_a_weight_shape_that_denies_the_weight_is_refused() -> None:
    modules, parts = parts_of(FUSED["CT"])
    modules[1].tensors["weight_shape"][0] = 31
    with pytest.raises(InconsistentFormatError, match=r"weight_shape says \[31, 128\]"):
        stack(modules, parts)


def test_equal_parts_that_end_inside_a_block_cannot_be_stacked() -> None:
    module = packers.eight_bit(
        np.random.default_rng(0), (96, 64), (64, 32), (2, 2), {"quant_method": "fp8", "weight_block_size": [64, 32]}
    )
    part = detect("m", module.infos, module.config)
    assert fuse([part, part, part]) is None
