"""What may be chosen: units, the sources that can give them, and what smoothing ties together."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_mixed.config import MixedPrecisionMap
from sglang_mixed.errors import CoverageError, DifferentBaseError, MixedPrecisionError
from sglang_mixed.plan import make_plan
from sglang_mixed.plan.candidates import Candidates, find_candidates

from ..models import Tensors, write, write_map

LAYER = "model.layers.0"


def candidates_of(folder: Path, split: bool = False, **sources: Path) -> Candidates:
    return find_candidates(MixedPrecisionMap(folder / "sources", sources), split=split)


def smoothed(tensors: Tensors) -> None:
    tensors[f"{LAYER}.post_attention_layernorm.weight"].mul_(2)


def test_an_expert_and_a_fused_matrix_are_chosen_whole(tmp_path: Path, sources: dict[str, Path]) -> None:
    found = candidates_of(tmp_path, bf16=sources["bf16"], fp8=sources["fp8"])
    assert found.base == "bf16"
    expert, attention = found.units[f"{LAYER}.mlp.experts.3"], found.units[f"{LAYER}.self_attn.qkv_proj"]
    assert {name.rpartition(".")[2] for name in expert.modules} == {"gate_proj", "up_proj", "down_proj"}
    assert {name.rpartition(".")[2] for name in attention.modules} == {"q_proj", "k_proj", "v_proj"}
    assert expert.group == f"{LAYER}.mlp.experts" and attention.group is None
    assert len(found.units) == 2 * (4 + 2)


def test_split_makes_every_matrix_a_choice_and_counts_formats_where_they_run_together(
    tmp_path: Path, sources: dict[str, Path]
) -> None:
    found = candidates_of(tmp_path, True, bf16=sources["bf16"], fp8=sources["fp8"])
    assert len(found.units) == 2 * (4 * 3 + 4)
    groups = {name.rpartition(".")[2]: unit.group for name, unit in found.units.items() if name.startswith(LAYER)}
    assert groups["gate_proj"] == groups["up_proj"] != groups["down_proj"]
    assert groups["q_proj"] == groups["v_proj"] and groups["o_proj"] is None


def test_a_uniform_choice_is_the_plan_of_its_map(tmp_path: Path, sources: dict[str, Path]) -> None:
    found = candidates_of(tmp_path, bf16=sources["bf16"], gptq=sources["gptq"])
    file = write_map(tmp_path, {"**.*_proj": "gptq"}, bf16=sources["bf16"], gptq=sources["gptq"])
    planned, chosen = make_plan(file), found.with_choice(found.uniform("gptq"))
    assert chosen.modules == planned.modules
    assert chosen.weight_bytes(2, 2) == planned.weight_bytes(2, 2)


def test_a_source_offers_only_what_it_holds(tmp_path: Path, sources: dict[str, Path]) -> None:
    def cut(tensors: Tensors) -> None:
        for name in [name for name in tensors if f"{LAYER}.mlp.experts.1.down_proj" in name]:
            del tensors[name]

    partial = write(tmp_path / "partial", "gptq", change=cut)
    found = candidates_of(tmp_path, bf16=sources["bf16"], gptq=partial, fp8=sources["fp8"])
    assert list(found.units[f"{LAYER}.mlp.experts.1"].choices) == ["bf16", "fp8"]
    assert list(found.units[f"{LAYER}.mlp.experts.2"].choices) == ["bf16", "gptq", "fp8"]


def test_smoothing_ties_a_norm_its_router_and_all_experts(tmp_path: Path, sources: dict[str, Path]) -> None:
    awq = write(tmp_path / "awq", "gptq", change=smoothed)
    found = candidates_of(tmp_path, bf16=sources["bf16"], awq=awq)
    (tie,) = found.ties
    assert tie.source == "awq"
    assert set(tie.units) == {f"{LAYER}.mlp.experts.{expert}" for expert in range(4)}
    assert set(tie.followers) == {f"{LAYER}.post_attention_layernorm", f"{LAYER}.mlp.gate"}
    plan = found.with_choice(found.uniform("awq"))
    assert {plan.modules[name].source for name in tie.followers} == {"awq"}
    assert plan.modules["model.layers.1.mlp.gate"].source == "bf16"


def test_a_smoothed_layer_that_is_not_whole_is_not_offered(tmp_path: Path, sources: dict[str, Path]) -> None:
    def change(tensors: Tensors) -> None:
        smoothed(tensors)
        for name in [name for name in tensors if f"{LAYER}.mlp.experts.1.up_proj" in name]:
            del tensors[name]

    awq = write(tmp_path / "awq", "gptq", change=change)
    found = candidates_of(tmp_path, bf16=sources["bf16"], awq=awq)
    assert not found.ties
    assert not [name for name in found.units if name.startswith(f"{LAYER}.mlp.experts")]
    assert "model.layers.1.mlp.experts.0" in found.units


@pytest.mark.parametrize(
    ("given", "error"), [(("fp8", "gptq"), CoverageError), (("bf16", "other"), DifferentBaseError)]
)
def test_sources_that_make_no_choice(
    tmp_path: Path, sources: dict[str, Path], given: tuple[str, str], error: type[MixedPrecisionError]
) -> None:
    sources["other"] = write(tmp_path / "other", "fp8", seed=1)
    with pytest.raises(error):
        candidates_of(tmp_path, **{name: sources[name] for name in given})
