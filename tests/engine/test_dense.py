"""Dense models (Qwen3 with tied embeddings, Llama) from seven sources, through `sgl.Engine`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sglang_mixed.plan import make_plan

from .comparison import BOUND
from .dense import LLAMA, QWEN3, write_model
from .reference import Comparison


@pytest.mark.parametrize("config", [QWEN3, LLAMA], ids=["qwen3", "llama"])
def test_a_dense_mix_of_seven_sources_equals_its_dequantized_model(
    config: dict[str, Any], tmp_path: Path, compare_with_reference: Callable[..., Comparison]
) -> None:
    described = write_model(tmp_path, config)
    compared = compare_with_reference(described)
    assert compared.largest_difference <= BOUND
    assert compared.differing_tokens == []
    assert compared.memory["weight_bytes"] == compared.memory["planned_bytes"] == make_plan(described).weight_bytes()
    assert set(compared.memory["by_module_kind"]) >= {"attention", "mlp", "norm", "embedding"}
