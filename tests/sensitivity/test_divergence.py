"""KL divergences of the trained tiny model, against transformers on a model that was changed by other means."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sglang_mixed.checkpoint import open_checkpoint
from sglang_mixed.config import MixedPrecisionMap
from sglang_mixed.plan.candidates import Candidates, find_candidates
from sglang_mixed.sensitivity.divergence import measure_divergence
from sglang_mixed.sensitivity.model import ReferenceModel

from ..engine.comparison import held_out_prompts
from ..engine.family_models import write_family
from ..engine.launch import TINY
from ..formats import packers
from ..models import write

EXPERT, ATTENTION = "model.layers.1.mlp.experts.5", "model.layers.0.self_attn.qkv_proj"


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    return torch.tensor([prompt[:48] for prompt in held_out_prompts() if len(prompt) >= 48][:4])


@pytest.fixture(scope="module")
def candidates() -> Candidates:
    return find_candidates(MixedPrecisionMap(TINY / "sources", {"bf16": TINY / "bf16", "int4": TINY / "gptq-int4"}))


@pytest.fixture(scope="module")
def model(candidates: Candidates, text: torch.Tensor) -> ReferenceModel:
    return ReferenceModel(candidates, text)


def coarse(unit: str, candidates: Candidates) -> dict[str, torch.Tensor]:
    return {name: candidates.dequantize("int4", name) for name in candidates.units[unit].modules}


def test_one_replaced_expert_moves_the_output_as_in_a_model_loaded_with_it(
    candidates: Candidates, model: ReferenceModel, text: torch.Tensor
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(str(TINY / "bf16"), dtype=torch.float32)
    int4 = open_checkpoint(TINY / "gptq-int4")
    with torch.no_grad():
        before = plain(input_ids=text).logits.log_softmax(-1)
        experts = plain.get_submodule("model.layers.1.mlp.experts")
        gate, up, down = (int4.dequantize(f"{EXPERT}.{part}_proj") for part in ("gate", "up", "down"))
        experts.gate_up_proj[5] = torch.cat((gate, up))
        experts.down_proj[5] = down
        after = plain(input_ids=text).logits.log_softmax(-1)
    expected = (before.exp() * (before - after)).sum(-1)
    with model.replaced(coarse(EXPERT, candidates)):
        found = model.divergence(1)
    assert found.mean() > 1e-6
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_layers_before_the_change_need_not_run(candidates: Candidates, model: ReferenceModel) -> None:
    with model.replaced(coarse(EXPERT, candidates)):
        assert model.divergence(1).equal(model.divergence(0))
    with model.replaced(coarse(ATTENTION, candidates)):
        assert model.divergence(0).mean() > 1e-6


def test_afterwards_the_base_is_as_it_was(candidates: Candidates, model: ReferenceModel) -> None:
    with pytest.raises(ZeroDivisionError), model.replaced(coarse(ATTENTION, candidates)):
        raise ZeroDivisionError
    assert not model.divergence(0).any()


def test_every_token_is_counted_at_its_experts(model: ReferenceModel) -> None:
    uses = model.expert_uses()
    assert list(uses) == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    assert all(sum(shares) == pytest.approx(2) for shares in uses.values())


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4", "deepseek_v2"])
def test_weights_are_found_however_transformers_stacks_them(tmp_path: Path, family: str) -> None:
    write_family(tmp_path / "bf16", family)
    write_family(tmp_path / "gptq", family, packers.gptq)
    sources = {name: tmp_path / name for name in ("bf16", "gptq")}
    described = MixedPrecisionMap(tmp_path / "sources", sources, allow_different_base=True)
    candidates = find_candidates(described)
    model = ReferenceModel(candidates, torch.arange(16).view(1, 16))
    for unit in candidates.units.values():
        for name in unit.modules:
            assert model.slot(name).equal(candidates.dequantize("bf16", name))


def test_every_unit_is_measured_and_a_dense_model_too(tmp_path: Path) -> None:
    sources = {kind: write(tmp_path / kind, kind, layers=1, experts=0) for kind in ("bf16", "fp8")}
    candidates = find_candidates(MixedPrecisionMap(tmp_path / "sources", sources))
    counted: list[int] = []
    found = measure_divergence(candidates, torch.arange(32).view(2, 16), advance=counted.append)
    assert set(found.errors["fp8"]) == set(candidates.units) and sum(counted) == len(candidates.units)
    assert min(found.errors["fp8"].values()) > 0
    assert found.uses == {} and found.details["tokens"] == 32
