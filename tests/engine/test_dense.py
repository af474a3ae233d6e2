"""Dense models (Qwen3 with tied embeddings, Llama) from seven sources, through `sgl.Engine`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sglang_mixed.plan import make_plan

from .comparison import BOUND, REQUEST, differing_tokens, largest_difference
from .conftest import Engine
from .dense import LLAMA, QWEN3, VOCABULARY, write_model
from .reference import write_reference


@pytest.mark.parametrize("config", [QWEN3, LLAMA], ids=["qwen3", "llama"])
def test_a_dense_mix_of_seven_sources_equals_its_dequantized_model(config: dict[str, Any], tmp_path: Path) -> None:
    described = write_model(tmp_path, config)
    plan = make_plan(described)
    reference = write_reference(plan, tmp_path / "reference")
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, VOCABULARY, 12 + index).tolist() for index in range(20)]
    request = {"input_ids": prompts, **REQUEST}
    mix = {"enable_mixed_precision": True, "mixed_precision_config": str(described)}
    engines = [
        Engine(tmp_path / f"{name}.log", model, request, skip_tokenizer_init=True, **arguments)
        for name, model, arguments in (("mixed", tmp_path / "bf16", mix), ("stock", reference, {}))
    ]
    ours, theirs = (engine.result() for engine in engines)
    answers = ours["answers"][0], theirs["answers"][0]
    assert largest_difference(*answers) <= BOUND
    assert differing_tokens(*answers) == []
    assert ours["memory"]["weight_bytes"] == ours["memory"]["planned_bytes"] == plan.weight_bytes()
    assert set(ours["memory"]["by_module_kind"]) >= {"attention", "mlp", "norm", "embedding"}
