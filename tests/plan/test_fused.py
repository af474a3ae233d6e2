"""Parts of one matrix must agree: every kind of group, the names, and the lines that put it right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sglang_mixed.errors import FusedGroupError

from ..models import Tensors, write
from .conftest import Mapped


@pytest.mark.parametrize(
    ("pattern", "group", "remedy"),
    [
        (
            "model.layers.0.self_attn.q_proj",
            "model.layers.0.self_attn.qkv_proj",
            '"model.layers.0.self_attn.k_proj": fp8',
        ),
        ("**.v_proj", "model.layers.0.self_attn.qkv_proj", '"model.layers.{0..1}.self_attn.q_proj": fp8'),
        ("**.{gate,up}_proj", "", ""),
        ("**.experts.*.gate_proj", "model.layers.0.mlp.experts.w13", "experts.{0..3}.up_proj"),
        ("model.layers.1.mlp.experts.{0..2}.*", "model.layers.1.mlp.experts.w2", "experts.{0..3}.up_proj"),
        ("**.experts.2.down_proj", "model.layers.0.mlp.experts.w2", "experts.{0..3}.down_proj"),
        ("**.o_proj", "", ""),
        ("**.down_proj", "", ""),
    ],
)
def test_a_group_that_is_torn(mapped: Mapped, pattern: str, group: str, remedy: str) -> None:
    if not group:
        assert mapped({pattern: "fp8"})
        return
    with pytest.raises(FusedGroupError) as caught:
        mapped({pattern: "fp8"})
    assert caught.value.tensor == group
    assert remedy in str(caught.value.remedy)
    assert "line 7" in str(caught.value) and "the default, bf16" in str(caught.value)


def test_the_advice_when_followed_makes_a_plan(mapped: Mapped) -> None:
    mapping = {"model.layers.1.mlp.experts.{0..2}.*": "fp8", "**.q_proj": "gptq"}
    for _ in range(3):
        try:
            mapped(mapping)
            break
        except FusedGroupError as error:
            lines = str(error.remedy).splitlines()[1:]
            mapping |= {line.split('"')[1]: line.split()[-1] for line in lines}
    assert mapped(mapping).modules["model.layers.1.self_attn.k_proj"].source == "gptq"


def test_exact_names_that_would_override_the_advice_are_named(mapped: Mapped) -> None:
    with pytest.raises(FusedGroupError, match=r"delete the exact names .* lines 7"):
        mapped({"model.layers.0.self_attn.q_proj.weight": "fp8", "**.self_attn.{k,v}_proj": "gptq"})


def test_two_sources_in_one_format_may_share_a_matrix(mapped: Mapped, tmp_path: Path) -> None:
    plan = mapped({"**.q_proj": "fp8", "**.{k,v}_proj": "other"}, other=write(tmp_path / "other", "fp8"))
    assert plan.modules["model.layers.0.self_attn.q_proj"].source == "fp8"
    assert plan.modules["model.layers.0.self_attn.k_proj"].source == "other"


def test_equal_formats_with_other_parameters_do_not(mapped: Mapped) -> None:
    with pytest.raises(FusedGroupError) as caught:
        mapped({"**.q_proj": "gptq", "**.{k,v}_proj": "gptq64"})
    assert "g32" in str(caught.value) and "g64" in str(caught.value)


def test_plain_parts_of_two_dtypes_are_one_matrix(mapped: Mapped, tmp_path: Path) -> None:
    assert mapped({"**.q_proj": "half"}, half=write(tmp_path / "half", "fp16"))


def test_a_source_that_is_torn_itself(mapped: Mapped, tmp_path: Path) -> None:
    def keep(tensors: Tensors) -> None:
        for layer in range(2):
            del tensors[f"model.layers.{layer}.self_attn.v_proj.weight_scale_inv"]
            tensors[f"model.layers.{layer}.self_attn.v_proj.weight"] = torch.zeros(32, 64, dtype=torch.bfloat16)

    torn = write(tmp_path / "torn", "fp8", change=keep)
    with pytest.raises(FusedGroupError) as caught:
        mapped({"**.self_attn.*_proj": "torn"}, torn=torn, fp8=None, gptq=None, gptq64=None)
    assert '_proj": bf16' not in str(caught.value.remedy) or "q_proj" in str(caught.value.remedy)


def test_dense_models_have_groups_too(mapped: Mapped, tmp_path: Path) -> None:
    dense = {kind: write(tmp_path / f"dense-{kind}", kind, experts=0) for kind in ("bf16", "fp8")}
    with pytest.raises(FusedGroupError) as caught:
        mapped({"**.up_proj": "fp8"}, gptq=None, gptq64=None, **dense)
    assert caught.value.tensor == "model.layers.0.mlp.gate_up_proj"
    assert mapped({"**.mlp.*": "fp8"}, gptq=None, gptq64=None, **dense)


def test_mixtrals_names(tmp_path: Path) -> None:
    from sglang_mixed.plan import make_plan

    from ..models import write_map

    def rename(tensors: Tensors) -> None:
        words = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2", "mlp": "block_sparse_moe"}
        for name in list(tensors):
            tensors[".".join(words.get(part, part) for part in name.split("."))] = tensors.pop(name)

    sources = {kind: write(tmp_path / kind, kind, change=rename) for kind in ("bf16", "fp8")}
    assert make_plan(write_map(tmp_path, {"**.w2": "fp8"}, **sources))
    with pytest.raises(FusedGroupError) as caught:
        make_plan(write_map(tmp_path, {"**.w3": "fp8"}, **sources))
    assert caught.value.tensor == "model.layers.0.block_sparse_moe.experts.w13"
