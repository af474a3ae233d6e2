"""Every weight of the base is found, readable and of the right shape, or the map is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sglang_mixed.errors import CoverageError, InconsistentFormatError, IndexFileError, ShapeError, UnknownFormatError

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
