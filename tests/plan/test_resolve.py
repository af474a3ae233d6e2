"""Which source a module comes from: defaults, precedence, and patterns that name nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_mixed.config import load_map
from sglang_mixed.errors import PatternError
from sglang_mixed.plan import make_plan

from ..models import write, write_map
from .conftest import Mapped

EXPERTS = "model.layers.*.mlp.experts.*.*.weight"


def test_weights_without_a_rule_come_from_the_default(mapped: Mapped) -> None:
    plan = mapped({EXPERTS: "fp8"})
    assert plan.base == "bf16"
    for name, module in plan.modules.items():
        assert module.source == ("fp8" if ".experts." in name else "bf16")
        assert module.format.name == ("fp8" if ".experts." in name else "plain")


def test_the_default_is_named_or_the_base_model_or_the_first(tmp_path: Path, sources: dict[str, Path]) -> None:
    file = write_map(tmp_path, {}, **sources)
    assert {module.source for module in make_plan(file).modules.values()} == {"bf16"}
    based = make_plan(file, base=sources["fp8"])
    assert based.base == "fp8" and {module.source for module in based.modules.values()} == {"fp8"}
    file = write_map(tmp_path, {}, default="gptq", **sources)
    based = make_plan(file, base=sources["bf16"])
    assert based.base == "bf16" and {module.source for module in based.modules.values()} == {"gptq"}


def test_a_base_model_that_is_no_source(tmp_path: Path, sources: dict[str, Path]) -> None:
    file = write_map(tmp_path, {}, fp8=sources["fp8"], gptq=sources["gptq"])
    assert make_plan(file, base=sources["bf16"]).base == "fp8"


def test_later_patterns_win_and_exact_names_always(mapped: Mapped) -> None:
    plan = mapped(
        {
            "model.layers.1.mlp.gate.weight": "fp8",
            "model.layers.0.mlp.gate": "gptq",
            "model.layers.*.mlp.gate.weight": "bf16",
            EXPERTS: "gptq",
            "model.layers.{0..0}.mlp.experts.*.*.weight": "fp8",
        }
    )
    assert plan.modules["model.layers.1.mlp.gate"].source == "fp8"
    assert plan.modules["model.layers.0.mlp.gate"].source == "gptq"
    assert plan.modules["model.layers.0.mlp.experts.3.up_proj"].source == "fp8"
    assert plan.modules["model.layers.1.mlp.experts.3.up_proj"].source == "gptq"


def test_a_line_without_effect_is_a_warning(mapped: Mapped) -> None:
    plan = mapped({"model.layers.*.mlp.experts.*.*": "fp8", EXPERTS: "gptq"})
    assert any("has no effect" in warning and "line 7" in warning for warning in plan.warnings)
    assert any("'gptq64' is declared and gives no weight" in warning for warning in plan.warnings)


def test_a_declared_source_that_gives_nothing_is_not_even_opened(mapped: Mapped, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    plan = mapped({}, gptq64=tmp_path / "broken")
    assert set(plan.sources) == set(plan.checkpoints) == {"bf16"}


def test_a_quantized_base_names_its_modules_by_weight(mapped: Mapped) -> None:
    plan = mapped({"model.layers.*.self_attn.*_proj.weight": "bf16"}, default="gptq")
    assert plan.modules["model.layers.0.self_attn.o_proj"].source == "bf16"
    assert plan.modules["model.layers.0.mlp.experts.0.up_proj"].source == "gptq"


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("model.layers.*.self_atn.q_proj.weight", "did you mean 'model.layers.*.self_attn.q_proj.weight'"),
        ("model.layers.1.self_attn.q_prj.weight", "did you mean 'model.layers.1.self_attn.q_proj.weight'"),
        ("model.layers.{0..1}.mlp.expert.*.up_proj", "did you mean 'model.layers.*.mlp.experts.*.up_proj.weight'"),
        ("model.layers.7.self_attn.q_proj.weight", "did you mean 'model.layers.0.self_attn.q_proj.weight'"),
        ("model.layers.0.self_attn", 'write "model.layers.0.self_attn.**"'),
        ("model.layers.0.self_attn.q_proj.bias", "matches no weight"),
        ("model.layers.5.self_attn.*", "matches no weight"),
    ],
)
def test_a_pattern_that_names_nothing(mapped: Mapped, tmp_path: Path, pattern: str, says: str) -> None:
    with pytest.raises(PatternError) as caught:
        mapped({"lm_head.weight": "bf16", pattern: "fp8"})
    assert caught.value.line == 8 and caught.value.file == str(tmp_path / "map.yaml")
    assert says in str(caught.value)


def test_weights_that_the_engine_never_loads(tmp_path: Path) -> None:
    import torch

    def extra(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.2.mtp.weight"] = torch.ones(4)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    folder = write(tmp_path / "dense", experts=0, change=extra, tie_word_embeddings=True)
    plan = make_plan(write_map(tmp_path, {}, fp16=folder))
    assert not {"model.layers.2.mtp", "model.layers.0.self_attn.rotary_emb", "lm_head"} & plan.modules.keys()
    with pytest.raises(PatternError, match="matches no weight") as caught:
        make_plan(write_map(tmp_path, {"lm_head.weight": "fp16"}, fp16=folder))
    assert "never loads" in str(caught.value.remedy)


def test_a_tied_head_of_a_routed_model_is_still_needed(tmp_path: Path) -> None:
    folder = write(tmp_path / "moe", tie_word_embeddings=True)
    assert "lm_head" in make_plan(write_map(tmp_path, {}, fp16=folder)).modules


def test_a_loaded_map_serves_as_well_as_its_path(mapped: Mapped, tmp_path: Path) -> None:
    plan = mapped({EXPERTS: "fp8"})
    assert make_plan(load_map(tmp_path / "map.yaml")) == plan
