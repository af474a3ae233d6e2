"""A mix in transformers' own models: built on `meta`, filled from a map, compared with the dequantized checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sglang_mixed.errors import CoverageError
from sglang_mixed.plan import make_plan
from sglang_mixed.torch import MixedPrecisionExperts, MixedPrecisionLinear, load_plan

from ..engine.families import FAMILIES, VOCABULARY
from ..engine.mixes import write_mix
from .models import build_on_meta, dequantized, relative_error

BOUND = 1e-2


#: Llama 4's names are others in its checkpoints; the two that are left out differ from DeepSeek-V3 in nothing here.
NAMES = [name for name in FAMILIES if name not in ("llama4", "deepseek_v2", "glm4_moe")]


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_from_another_source_gives_the_dequantized_model(name: str, tmp_path: Path) -> None:
    plan = make_plan(write_mix(tmp_path, name, "everything differs"))
    model, reference = build_on_meta(plan.sources[plan.base]), dequantized(plan, tmp_path / "reference")
    original = sum(type(one) is torch.nn.Linear for one in model.modules())
    report = load_plan(model, plan).to_dict()
    ids = torch.randint(2, VOCABULARY, (2, 33), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert relative_error(model(ids).logits, reference(ids).logits) <= BOUND
    ours, theirs = (one.generate(ids[:1], max_new_tokens=8, do_sample=False) for one in (model, reference))
    assert torch.equal(ours, theirs)
    assert plan.weight_bytes() * 0.95 <= report["bytes"] <= plan.weight_bytes() * 1.05
    tied = plan.checkpoints[plan.base].config["tie_word_embeddings"]
    assert sum(isinstance(one, MixedPrecisionLinear) for one in model.modules()) == original - tied
    layers = {module.partition(".experts.")[0] for module in plan.modules if ".experts." in module}
    assert sum(isinstance(one, MixedPrecisionExperts) for one in model.modules()) == len(layers)


def test_a_model_of_other_names_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    # Transformers' Llama 4 for text alone lacks the prefix that its checkpoints have.
    plan = make_plan(write_mix(tmp_path, "llama4", "everything differs"))
    with pytest.raises(CoverageError, match=r"no weights for model\.embed_tokens\.weight"):
        load_plan(build_on_meta(plan.sources[plan.base]), plan)
