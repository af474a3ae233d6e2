"""The engine's counts are those of transformers' own model over the same tokens, expert by expert.

Both compute in float32: in 16 bits a token whose second and third expert are nearly as good may go to either.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from sglang_mixed.experts import ExpertExport
from sglang_mixed.plan import make_plan

from .comparison import random_prompts
from .families import EXPERTS, FAMILIES, VOCABULARY
from .family_models import write_family
from .launch import Engine
from .mixes import write_mix
from .routed import route

NEW_TOKENS = 6
PROMPTS = random_prompts(VOCABULARY)[:10]
SAMPLING = {"max_new_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}


class Case(NamedTuple):
    """A family, how it is served, and what its router's weights are multiplied with outside of the router."""

    family: str
    arguments: dict[str, Any]
    factor: float = 1.0


CASES = {
    "qwen3_moe, chunks of prompts beside decoded tokens": Case(
        "qwen3_moe", {"chunked_prefill_size": 48, "enable_mixed_chunk": True}
    ),
    "qwen3_moe, TP 2": Case("qwen3_moe", {"tp_size": 2}),
    "qwen3_moe, TP 2, EP 2": Case("qwen3_moe", {"tp_size": 2, "ep_size": 2}),
    "qwen3_moe, DP 2": Case("qwen3_moe", {"dp_size": 2}),
    "qwen2_moe": Case("qwen2_moe", {}),
    "mixtral": Case("mixtral", {}),
    "deepseek_v2": Case("deepseek_v2", {}, 2.5),
    "gpt_oss": Case("gpt_oss", {}),
    "llama4": Case("llama4", {}),
}


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of each family: every expert of Qwen3-MoE from another source than its neighbours, the others all in BF16."""
    folder = tmp_path_factory.mktemp("maps")
    found = {"qwen3_moe": write_mix(folder / "qwen3_moe", "qwen3_moe", "everything differs")}
    for name in {case.family for case in CASES.values()} - {"qwen3_moe"}:
        # GPT-OSS's router is in its config's dtype, whatever the engine's.
        family = FAMILIES[name]
        write_family(folder / name / "bf16", replace(family, config={**family.config, "torch_dtype": "float32"}))
        found[name] = folder / name / "map.yaml"
        found[name].write_text("mixed_precision:\n  bf16_path: bf16\n")
    return found


@pytest.fixture(scope="module")
def engines(maps: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Engine]:
    """All at once: most of their time is waiting."""
    folder = tmp_path_factory.mktemp("engines")
    started = {}
    for name, case in CASES.items():
        described = maps[case.family]
        mix = {"enable_mixed_precision": True, "mixed_precision_config": str(described), "dtype": "float32"}
        requests = {"input_ids": PROMPTS, "sampling_params": SAMPLING}
        arguments = {"skip_tokenizer_init": True, "disable_radix_cache": True, **mix, **case.arguments}
        started[name] = Engine(folder / f"{name}.log", described.parent / "bf16", requests, **arguments)
    return started


@pytest.mark.parametrize("name", CASES)
def test_counts_are_those_of_hooks_on_the_reference(
    name: str, engines: dict[str, Engine], maps: dict[str, Path], tmp_path: Path
) -> None:
    result, case = engines[name].result(), CASES[name]
    counts = ExpertExport.from_json(result["experts"]).counts
    assert counts is not None
    streams = [(prompt, answer["output_ids"]) for prompt, answer in zip(PROMPTS, result["answers"][0], strict=True)]
    expected = route(make_plan(maps[case.family]), tmp_path / "reference", streams, EXPERTS)
    np.testing.assert_array_equal(counts.prefill, expected.prefill)
    np.testing.assert_array_equal(counts.decode, expected.decode)
    np.testing.assert_allclose(counts.weights * case.factor, expected.weights, rtol=1e-4)
    assert (counts.prefill.sum(axis=1) == sum(map(len, PROMPTS)) * counts.top_k).all()
    assert (counts.decode.sum(axis=1) == len(PROMPTS) * (NEW_TOKENS - 1) * counts.top_k).all()
    assert ((counts.last_active > 0) == (counts.total > 0)).all()
    assert (counts.last_active[counts.total > 0] > counts.since).all() and (counts.last_active < counts.until).all()
