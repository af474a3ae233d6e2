"""`MixedPrecisionLinear` and its dequantization cache."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch

from sglang_mixed import DequantizationCache, MixedPrecisionLinear, open_checkpoint
from sglang_mixed.errors import ShapeError
from sglang_mixed.kernels.implied import implied

from ..engine.layers import WRITERS, write_experts
from .models import relative_error

NAME = "model.layers.0.self_attn.q_proj"


@pytest.fixture(params=["bf16", *WRITERS])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_experts(tmp_path / "checkpoint", request.param, intermediate=128)


def test_every_format_computes_with_its_dequantized_weight(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    layer, weight = MixedPrecisionLinear.from_checkpoint(checkpoint, NAME), checkpoint.dequantize(NAME)
    assert (layer.out_features, layer.in_features) == tuple(weight.shape) and layer.format in repr(layer)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        x = torch.randn(2, 3, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(dtype)
        y = layer(x)
        assert y.dtype == dtype and y.shape == (2, 3, weight.shape[0])
        assert relative_error(y, x.double() @ weight.double().T) <= 1e-2
    assert layer(x[:0]).shape == (0, 3, weight.shape[0])
    assert relative_error(layer.weight, weight) <= 1e-2


def test_weights_are_moved_whole_never_cast_and_survive_copies_and_state_dicts(folder: Path) -> None:
    layer = MixedPrecisionLinear.from_checkpoint(open_checkpoint(folder), NAME)
    x = torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(0))
    expected, held = layer(x), {name: buffer.clone() for name, buffer in layer.named_buffers()}
    assert torch.equal(copy.deepcopy(layer).half().double().to(torch.bfloat16)(x), expected)
    assert held and all(torch.equal(buffer, held[name]) for name, buffer in layer.named_buffers())
    saved = io.BytesIO()
    torch.save(layer.state_dict(), saved)
    other = copy.deepcopy(layer)
    for buffer in other.buffers():
        buffer.zero_()
    saved.seek(0)
    other.load_state_dict(torch.load(saved))
    assert torch.equal(other(x), expected)


def test_on_another_device_a_weight_lies_as_in_its_file(folder: Path) -> None:
    # `meta` stands for a device that is not a CPU: it shows what is kept there, and that it is the file's layout.
    layer = MixedPrecisionLinear.from_checkpoint(open_checkpoint(folder), NAME)
    (matrix,) = layer.matrices
    files = matrix.kernel.unpack(matrix.resident, matrix.format)
    kept = {name: (one.dtype, one.shape) for name, one in files.items() if name not in implied(matrix.format)}
    layer.to("meta")
    assert {name: (one.dtype, one.shape) for name, one in matrix.resident.items()} == kept
    assert {one.device.type for one in layer.buffers()} == {"meta"} and len(list(layer.buffers())) == len(kept)


def test_a_gradient_reaches_the_input(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_experts(tmp_path / "fp8", "fp8-block", intermediate=128))
    layer, weight = MixedPrecisionLinear.from_checkpoint(checkpoint, NAME), checkpoint.dequantize(NAME)
    x = torch.randn(2, weight.shape[1], requires_grad=True)
    layer(x).sum().backward()
    assert relative_error(x.grad, weight.sum(0).expand(2, -1)) <= 1e-5


def test_a_norm_is_no_linear_layer(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_experts(tmp_path / "bf16", "bf16", intermediate=128))
    with pytest.raises(ShapeError, match="a weight of shape"):
        MixedPrecisionLinear.from_checkpoint(checkpoint, "model.norm")


def test_the_cache_keeps_the_least_recently_used_within_its_limit(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_experts(tmp_path / "gptq", "gptq", intermediate=128))
    names = [f"model.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")]
    sizes = [2 * checkpoint.dequantize(name).numel() for name in names]
    cache = DequantizationCache(sum(sizes[:2]))
    query, key, value = (MixedPrecisionLinear.from_checkpoint(checkpoint, name, cache) for name in names)
    x = torch.randn(3, query.in_features).bfloat16()
    plain = MixedPrecisionLinear.from_checkpoint(checkpoint, names[0])(x)
    for layer in (query, key, query, value, key):
        layer(x)
        assert cache.nbytes <= cache.limit_bytes
    # value drove out key, which was used less recently than query, and key then query.
    assert (cache.hits, cache.misses, cache.evictions) == (1, 4, 2)
    assert relative_error(query(x), plain) <= 1e-2
    cache.clear()
    assert cache.stats()["bytes"] == cache.stats()["weights"] == 0


@pytest.mark.parametrize("limit", [0, 100])
def test_a_cache_that_is_off_or_too_small_is_not_used(limit: int, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_experts(tmp_path / "gptq", "gptq", intermediate=128))
    cache = DequantizationCache(limit)
    layer = MixedPrecisionLinear.from_checkpoint(checkpoint, NAME, cache)
    layer(torch.randn(1, layer.in_features))
    assert cache.stats() == {**dict.fromkeys(cache.stats(), 0), "limit_bytes": limit}


def test_a_copied_layer_has_a_cache_of_its_own(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_experts(tmp_path / "gptq", "gptq", intermediate=128))
    layer = MixedPrecisionLinear.from_checkpoint(checkpoint, NAME, DequantizationCache(1 << 20))
    layer(torch.randn(1, layer.in_features))
    copied = copy.deepcopy(layer)
    assert copied.cache.stats()["weights"] == 0 and copied.cache.limit_bytes == 1 << 20
