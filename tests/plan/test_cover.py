"""Every weight of the base is found, readable and of the right shape, or the map is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sglang_mixed.errors import (
    CoverageError,
    FormatError,
    InconsistentFormatError,
    IndexFileError,
    ShapeError,
    UnknownFormatError,
)

from ..models import Tensors, write
from .conftest import Mapped

UP = "model.layers.1.mlp.experts.2.up_proj"


def test_a_module_that_the_chosen_source_lacks(mapped: Mapped, tmp_path: Path) -> None:
    def without(tensors: Tensors) -> None:
        for local in ("weight", "weight_scale_inv"):
            del tensors[f"{UP}.{local}"]

    broken = write(tmp_path / "broken", "fp8", change=without)
    with pytest.raises(CoverageError) as caught:
        mapped({"model.layers.*.mlp.experts.*.*.weight": "fp8"}, fp8=broken)
    assert caught.value.tensor == UP and caught.value.file == str(broken)
    assert f'"{UP}": bf16' in str(caught.value.remedy) and "line 7" in str(caught.value.rule)


def test_a_source_that_lacks_whole_layers_folds_them(mapped: Mapped, tmp_path: Path) -> None:
    def without(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            del tensors[name]

    with pytest.raises(CoverageError) as caught:
        mapped({"**": "fp8"}, fp8=write(tmp_path / "broken", "fp8", change=without))
    assert '"model.layers.{0..1}.mlp.experts.{0..3}.down_proj": bf16' in str(caught.value.remedy)


def test_another_shape(mapped: Mapped, tmp_path: Path) -> None:
    def wider(tensors: Tensors) -> None:
        tensors[f"{UP}.weight"] = torch.zeros(160, 64).to(torch.float8_e4m3fn)
        tensors[f"{UP}.weight_scale_inv"] = torch.ones(5, 2)

    broken = write(tmp_path / "broken", "fp8", change=wider)
    with pytest.raises(ShapeError) as caught:
        mapped({"**.experts.**": "fp8"}, fp8=broken)
    assert caught.value.tensor == UP and "[160, 64]" in str(caught.value) and "[128, 64]" in str(caught.value)
    assert caught.value.file == str(broken / "model.safetensors")


def test_a_broken_module_that_is_not_mapped_does_not_matter(mapped: Mapped, tmp_path: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors["model.layers.0.self_attn.q_proj.weight_scale_inv"] = torch.ones(7, 7)

    broken = write(tmp_path / "broken", "fp8", change=spoil)
    assert mapped({"**.experts.**": "fp8"}, fp8=broken).modules[UP].format.name == "fp8"
    with pytest.raises(InconsistentFormatError) as caught:
        mapped({"**.self_attn.*": "fp8"}, fp8=broken)
    assert caught.value.file == str(broken / "model.safetensors")
    assert str(caught.value.tensor).startswith("model.layers.0.self_attn.q_proj")


def test_a_format_that_is_not_known(mapped: Mapped, tmp_path: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors[f"{UP}.weight"] = torch.zeros(128, 32, dtype=torch.uint8)
        tensors[f"{UP}.weight_scale_inv"] = torch.zeros(128, 4).to(torch.float8_e4m3fn)

    with pytest.raises((UnknownFormatError, InconsistentFormatError)) as caught:
        mapped({"**.experts.**": "fp8"}, fp8=write(tmp_path / "broken", "fp8", change=spoil))
    assert caught.value.file and str(caught.value.tensor).startswith(UP)


def biased(tensors: Tensors) -> None:
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.q_proj.bias"] = torch.ones(64, dtype=torch.bfloat16)


def test_a_bias_comes_with_its_module(mapped: Mapped, tmp_path: Path, sources: dict[str, Path]) -> None:
    base = write(tmp_path / "biased", change=biased)
    quantized = write(tmp_path / "biased8", "fp8", change=biased)
    plan = mapped({"**.self_attn.*_proj": "fp8"}, bf16=base, fp8=quantized)
    module = plan.modules["model.layers.0.self_attn.q_proj"]
    assert module.bias == "BF16" and set(module.tensors) == {"weight", "weight_scale_inv", "bias"}
    assert plan.module_bytes(module) - plan.module_bytes(module._replace(bias=None)) == 128
    with pytest.raises(CoverageError) as caught:
        mapped({"**.self_attn.*_proj": "fp8"}, bf16=base)
    assert caught.value.tensor == "model.layers.0.self_attn.q_proj.bias"


def zero_biased(tensors: Tensors) -> None:
    biased(tensors)
    tensors |= {name: torch.zeros_like(tensor) for name, tensor in tensors.items() if name.endswith(".bias")}


def test_a_bias_of_values_that_the_base_does_not_have_is_refused(mapped: Mapped, tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match="the base model has none") as caught:
        mapped({"**.self_attn.*_proj": "fp8"}, fp8=write(tmp_path / "biased8", "fp8", change=biased))
    assert caught.value.tensor == "model.layers.0.self_attn.q_proj.bias"


def test_a_bias_of_zeros_that_the_base_does_not_have_is_left_out_with_a_warning(mapped: Mapped, tmp_path: Path) -> None:
    plan = mapped({"**.self_attn.*_proj": "fp8"}, fp8=write(tmp_path / "biased8", "fp8", change=zero_biased))
    assert "bias" not in plan.modules["model.layers.0.self_attn.q_proj"].tensors
    assert any("model.layers.{0..1}.self_attn.q_proj" in warning for warning in plan.warnings)
    plain = mapped({"**.self_attn.*_proj": "other"}, other=write(tmp_path / "biased16", "fp16", change=zero_biased))
    assert plain.modules["model.layers.0.self_attn.q_proj"].tensors == ("weight",)


def test_tensors_beside_a_plain_weight_come_with_it(mapped: Mapped, tmp_path: Path) -> None:
    def correct(tensors: Tensors) -> None:
        tensors["model.layers.0.mlp.gate.e_score_correction_bias"] = torch.ones(4)

    base = write(tmp_path / "corrected", change=correct)
    assert "e_score_correction_bias" in mapped({}, bf16=base).modules["model.layers.0.mlp.gate"].tensors
    with pytest.raises(CoverageError, match="e_score_correction_bias"):
        mapped({"**.gate": "fp8"}, bf16=base)


def test_a_shard_with_as_many_weights_of_another_model(mapped: Mapped, tmp_path: Path) -> None:
    def rename(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".layers.1." in name]:
            tensors[name.replace(".layers.1.", ".layers.7.")] = tensors.pop(name)

    broken, other = (
        write(tmp_path / "broken", "fp8", shards=3),
        write(tmp_path / "other", "fp8", shards=3, change=rename),
    )
    for file in other.glob("*.safetensors"):
        (broken / file.name).write_bytes(file.read_bytes())
    with pytest.raises(IndexFileError) as caught:
        mapped({"**.experts.**": "fp8"}, fp8=broken)
    assert ".layers.7." in str(caught.value.tensor)


def with_cache_scales(tensors: Tensors) -> None:
    """As compressed-tensors names them in one layer, and ModelOpt in the other."""
    for local in ("k_scale", "v_scale"):
        tensors[f"model.layers.0.self_attn.{local}"] = torch.ones(1)
        tensors[f"model.layers.1.self_attn.{local[0]}_proj.{local}"] = torch.tensor(1.0)


@pytest.mark.parametrize("source", ["bf16", "fp8"])
def test_scales_of_the_key_value_cache_are_no_weights(mapped: Mapped, tmp_path: Path, source: str) -> None:
    changed = write(tmp_path / "scaled", source, change=with_cache_scales)
    plan = mapped({"**.self_attn.*_proj": "fp8"}, **{source: changed})
    assert "model.layers.0.self_attn" not in plan.modules
    assert set(plan.modules["model.layers.1.self_attn.k_proj"].tensors) == {"weight", "weight_scale_inv"}
    assert plan.weight_bytes() == mapped({"**.self_attn.*_proj": "fp8"}).weight_bytes()
    (said,) = (warning for warning in plan.warnings if "key-value cache" in warning)
    assert ("model.layers.0.self_attn" in said) == (source == "bf16")
    assert ("model.layers.1.self_attn.k_proj" in said) == (source == "fp8")


ORIGIN = "model.layers.1.self_attn.q_proj"


def with_random_codes(offset: int, symmetric: bool) -> Callable[[Tensors], None]:
    """q_proj of layer 1 as AutoRound packs a weight: near the original, its zero points stored less `offset`."""

    def change(tensors: Tensors) -> None:
        original = torch.randn(64, 64, generator=torch.Generator().manual_seed(5))
        low = torch.full((64, 2), -2.0) if symmetric else original.view(64, 2, 32).amin(2)
        step = torch.full((64, 2), 0.25) if symmetric else (original.view(64, 2, 32).amax(2) - low) / 15
        zeros = torch.round(-low / step)
        codes = torch.round(original.view(64, 2, 32) / step[..., None] + zeros[..., None]).clamp(0, 15)
        place = 4 * torch.arange(8)
        words = (codes.view(64, 8, 8).long() << place).sum(2).to(torch.int32).T
        stored = ((zeros.long() - offset).T.reshape(2, 8, 8) << place).sum(2).to(torch.int32)
        tensors |= {
            f"{ORIGIN}.qweight": words,
            f"{ORIGIN}.qzeros": stored,
            f"{ORIGIN}.scales": step.T.to(torch.float16),
        }

    return change


def with_original(tensors: Tensors) -> None:
    tensors[f"{ORIGIN}.weight"] = torch.randn(64, 64, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)


def autoround(symmetric: bool) -> dict[str, object]:
    return {"quant_method": "auto-round", "packing_format": "auto_round", "bits": 4, "group_size": 32, "sym": symmetric}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("offset", [0, 1])
def test_zero_points_are_read_as_the_original_shows(
    mapped: Mapped, tmp_path: Path, offset: int, symmetric: bool
) -> None:
    base = write(tmp_path / "original", change=with_original)
    config = autoround(symmetric)
    change = with_random_codes(offset, symmetric)
    packed = write(tmp_path / "packed", "gptq", change=change, quantization_config=config)
    found = mapped({ORIGIN: "gptq"}, bf16=base, gptq=packed).modules[ORIGIN].format.parameters
    assert (found.zero_offset, found.zero_offset_known) == (offset, True)


def test_zero_points_that_nothing_shows_are_refused(mapped: Mapped, tmp_path: Path) -> None:
    config, change = autoround(False), with_random_codes(1, False)
    packed = write(tmp_path / "packed", "gptq", change=change, quantization_config=config)
    with pytest.raises(FormatError, match=r"(?s)does not tell whether zero points.*16-bit original") as caught:
        mapped({}, "gptq", gptq=packed)
    assert caught.value.file == str(packed / "model.safetensors") and str(caught.value.tensor).endswith("qzeros")
    with pytest.raises(FormatError, match="far from the original"):
        mapped({ORIGIN: "gptq"}, gptq=packed)


def test_experts_in_a_layout_that_is_not_read_are_named(mapped: Mapped, tmp_path: Path) -> None:
    def fused(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            del tensors[name]
        for layer in range(2):
            owner = f"model.layers.{layer}.mlp.experts"
            tensors[f"{owner}.gate_up_proj"] = torch.zeros(4, 256, 64).to(torch.float8_e4m3fn)
            tensors[f"{owner}.gate_up_proj_scale_inv"] = torch.ones(4, 8, 2)

    with pytest.raises(CoverageError, match=r"gate_up_proj, gate_up_proj_scale_inv of all experts .* not read"):
        mapped({"**.experts.**": "fp8"}, fp8=write(tmp_path / "fused", "fp8", change=fused))
