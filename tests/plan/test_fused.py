"""Parts of one matrix may disagree: the plan stands, and tells once what it costs."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_mixed.plan import make_plan

from ..models import Tensors, write, write_map
from .conftest import Mapped


@pytest.mark.parametrize(
    ("mapping", "told"),
    [
        ({"model.layers.0.self_attn.q_proj": "fp8"}, ("parts of one matrix", "1 more", "layers.0.self_attn.qkv_proj")),
        (
            {"**.v_proj": "fp8", "**.k_proj": "gptq"},
            ("parts of one matrix", "4 more", "layers.{0..1}.self_attn.qkv_proj"),
        ),
        (
            {"**.experts.*.gate_proj": "fp8"},
            ("experts of one layer", "launches of one", "layers.{0..1}.mlp.experts.w13"),
        ),
        (
            {"**.experts.2.down_proj": "fp8"},
            ("experts of one layer", "launches of one", "layers.{0..1}.mlp.experts.w2"),
        ),
        (
            {"model.layers.1.mlp.experts.{0..2}.*": "fp8", "model.layers.1.mlp.experts.3.*": "gptq"},
            (
                "experts of one layer",
                "launches of one",
                "model.layers.1.mlp.experts.w13",
                "model.layers.1.mlp.experts.w2",
            ),
        ),
        ({"**.q_proj": "gptq", "**.{k,v}_proj": "gptq64"}, ("parts of one matrix", "2 more")),
    ],
)
def test_the_cost_of_a_split_is_told_once(mapped: Mapped, mapping: dict[str, str], told: tuple[str, ...]) -> None:
    plan = mapped(mapping)
    (notice,) = [warning for warning in plan.warnings if "kernel launches" in warning]
    assert all(words in notice for words in told)


@pytest.mark.parametrize("pattern", ["**.{gate,up}_proj", "**.o_proj", "**.down_proj", "**.self_attn.{q,k,v}_proj"])
def test_parts_that_agree_cost_nothing(mapped: Mapped, pattern: str) -> None:
    assert not any("kernel launches" in warning for warning in mapped({pattern: "fp8"}).warnings)


def test_two_sources_in_one_format_may_share_a_matrix(mapped: Mapped, tmp_path: Path) -> None:
    plan = mapped({"**.q_proj": "fp8", "**.{k,v}_proj": "other"}, other=write(tmp_path / "other", "fp8"))
    assert plan.modules["model.layers.0.self_attn.q_proj"].source == "fp8"
    assert plan.modules["model.layers.0.self_attn.k_proj"].source == "other"
    assert not any("kernel launches" in warning for warning in plan.warnings)


def test_plain_parts_of_two_dtypes_are_one_matrix(mapped: Mapped, tmp_path: Path) -> None:
    plan = mapped({"**.q_proj": "half"}, half=write(tmp_path / "half", "fp16"))
    assert not any("kernel launches" in warning for warning in plan.warnings)


def test_dense_models_have_fused_matrices_too(mapped: Mapped, tmp_path: Path) -> None:
    dense = {kind: write(tmp_path / f"dense-{kind}", kind, experts=0) for kind in ("bf16", "fp8")}
    plan = mapped({"**.up_proj": "fp8"}, gptq=None, gptq64=None, **dense)
    assert any("mlp.gate_up_proj" in warning for warning in plan.warnings)


def test_mixtrals_names(tmp_path: Path) -> None:
    def rename(tensors: Tensors) -> None:
        words = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2", "mlp": "block_sparse_moe"}
        for name in list(tensors):
            tensors[".".join(words.get(part, part) for part in name.split("."))] = tensors.pop(name)

    sources = {kind: write(tmp_path / kind, kind, change=rename) for kind in ("bf16", "fp8")}
    assert not make_plan(write_map(tmp_path, {"**.w2": "fp8"}, **sources)).warnings
    (notice,) = make_plan(write_map(tmp_path, {"**.w3": "fp8"}, **sources)).warnings
    assert "block_sparse_moe.experts.w13" in notice
