from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from sglang_mixed.errors import ExpertCountsError
from sglang_mixed.experts import ExpertCounts

from .synthetic import counts


def equal(one: ExpertCounts, other: ExpertCounts) -> bool:
    return one.to_json() == other.to_json()


def test_counts_survive_json_to_the_last_bit() -> None:
    original = counts(layers=(1, 2, 5), experts=7)
    assert equal(ExpertCounts.from_json(json.loads(json.dumps(original.to_json()))), original)


def test_a_sum_adds_tokens_and_weights_and_spans_both_times() -> None:
    one, other = counts(seed=1, since=100.0, until=200.0), counts(seed=2, since=50.0, until=150.0)
    both = one + other
    assert np.array_equal(both.prefill, one.prefill + other.prefill)
    assert np.array_equal(both.decode, one.decode + other.decode)
    assert np.array_equal(both.weights, one.weights + other.weights)
    assert np.array_equal(both.last_active, np.maximum(one.last_active, other.last_active))
    assert (both.since, both.until) == (50.0, 200.0)
    assert equal(one + other, other + one)


def test_every_token_activates_top_k_experts() -> None:
    one = counts(top_k=2, tokens=50)
    assert one.total.sum(axis=1).tolist() == [100] * len(one.layers)
    assert one.tokens.tolist() == [50] * len(one.layers)


@pytest.mark.parametrize(
    "other",
    [counts(layers=(0, 2)), counts(experts=9), counts(top_k=3), counts(layers=(1, 0))],
    ids=["layers", "experts", "top_k", "order"],
)
def test_another_models_counts_are_not_added(other: ExpertCounts) -> None:
    with pytest.raises(ExpertCountsError, match="added to those of 2 x 8"):
        counts() + other


@pytest.mark.parametrize(
    "change",
    [
        {"prefill": None},
        {"prefill": [[1, 2], [3]]},
        {"prefill": [[0.5] * 8] * 2},
        {"decode": [[-1] * 8] * 2},
        {"decode": [[0] * 7] * 2},
        {"weights": [["many"] * 8] * 2},
        {"weights": [[float("nan")] * 8] * 2},
        {"layers": [0]},
        {"layers": [0, 0]},
        {"since": "yesterday"},
        {"decode": [[2**63] * 8] * 2},
    ],
    ids=str,
)
def test_json_that_is_no_count_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ExpertCountsError):
        ExpertCounts.from_json(counts().to_json() | change)


def test_zeros_are_the_neutral_element_of_the_sum() -> None:
    one = counts()
    nothing = ExpertCounts.zeros(one.layers, one.experts, one.top_k, one.since)
    assert equal(nothing + one, one)
