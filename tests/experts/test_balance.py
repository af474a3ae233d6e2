from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sglang_mixed.experts.balance import effective_experts, gini, top_share

LAYERS = arrays(np.int64, st.tuples(st.integers(1, 4), st.integers(1, 12)), elements=st.integers(0, 1000))


@given(LAYERS)
def test_gini_is_half_the_relative_mean_absolute_difference(counts: np.ndarray) -> None:
    for row, found in zip(counts.astype(float), gini(counts), strict=True):
        if row.sum() == 0:
            assert math.isnan(found)
        else:
            assert found == pytest.approx(np.abs(row[:, None] - row).mean() / (2 * row.mean()))


@given(LAYERS)
def test_effective_experts_is_the_exponential_of_the_entropy(counts: np.ndarray) -> None:
    for row, found in zip(counts, effective_experts(counts), strict=True):
        shares = [value / row.sum() for value in row if value]
        expected = math.exp(-sum(share * math.log(share) for share in shares)) if shares else math.nan
        assert found == pytest.approx(expected, nan_ok=True)
        assert not shares or 1 - 1e-9 <= found <= len(row) + 1e-9


@pytest.mark.parametrize(("experts", "hottest"), [(1, 1), (8, 1), (10, 1), (11, 2), (128, 13)])
def test_the_top_tenth_is_rounded_up_to_whole_experts(experts: int, hottest: int) -> None:
    counts = np.arange(experts)[None] + 1
    assert top_share(counts)[0] == pytest.approx(sorted(counts[0])[-hottest:] @ np.ones(hottest) / counts.sum())


def test_even_and_one_sided_layers_have_the_extreme_values() -> None:
    layers = np.array([[5, 5, 5, 5], [0, 20, 0, 0]])
    assert gini(layers).tolist() == [0, 0.75]
    assert effective_experts(layers).tolist() == pytest.approx([4, 1])
    assert top_share(layers).tolist() == [0.25, 1]
