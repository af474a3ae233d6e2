"""Distances between predictions, and their intervals."""

from __future__ import annotations

import numpy as np
import pytest

from sglang_mixed.comparison import Predictions, compare_predictions
from sglang_mixed.comparison.statistics import divergence, estimate, perplexity

VOCABULARY = 40


def predictions(logits: np.ndarray, top: int) -> Predictions:
    """What a server says of these distributions, the text being token 0 throughout."""
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    ids = np.argsort(-logprobs, axis=-1)[..., :top]
    return Predictions(logprobs[..., 0], ids, np.take_along_axis(logprobs, ids, -1))


@pytest.fixture
def logits() -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    ours = 3 * draw.normal(size=(6, 10, VOCABULARY))
    return ours, ours + 0.3 * draw.normal(size=ours.shape)


def test_over_the_whole_vocabulary_the_divergence_is_exact(logits: tuple[np.ndarray, np.ndarray]) -> None:
    ours, theirs = (one - np.log(np.exp(one).sum(-1, keepdims=True)) for one in logits)
    expected = (np.exp(ours) * (ours - theirs)).sum(-1)
    found = divergence(*(predictions(one, VOCABULARY) for one in logits))
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_over_the_likeliest_it_is_a_lower_bound_that_grows(logits: tuple[np.ndarray, np.ndarray]) -> None:
    whole = divergence(*(predictions(one, VOCABULARY) for one in logits))
    few, more = (divergence(*(predictions(one, top) for one in logits)) for top in (3, 20))
    assert (few <= whole + 1e-9).all() and (more <= whole + 1e-9).all()
    assert few.mean() < more.mean() < whole.mean()
    assert more.mean() > 0.9 * whole.mean()


def test_a_server_is_no_distance_from_itself(logits: tuple[np.ndarray, np.ndarray]) -> None:
    same = predictions(logits[0], 8)
    found = compare_predictions(same, same)
    assert found["divergence"] == {"value": 0, "low": 0, "high": 0}
    assert found["top_1_agreement"]["value"] == 1 and found["perplexity_ratio"]["value"] == 1


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    draw = np.random.default_rng(1)
    hits = 0
    for _ in range(30):
        found = estimate(lambda values: float(values.mean()), draw.normal(5, 2, size=(40, 3)))
        assert found.low <= found.value <= found.high
        hits += found.low <= 5 <= found.high
    assert 24 <= hits <= 30


def test_perplexity_of_equal_chances_is_their_number() -> None:
    assert perplexity(np.full((2, 3), -np.log(7))) == pytest.approx(7)
