"""Distances between two servers' predictions, and how sure they are: windows are drawn again with replacement."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .server import Floats, Predictions

RESAMPLES, CONFIDENCE = 1000, 0.95


class Estimate(NamedTuple):
    """A value with the bounds of its 95 % confidence interval."""

    value: float
    low: float
    high: float


def divergence(ours: Predictions, theirs: Predictions) -> Floats:
    """KL(ours || theirs) in nats of every prediction, [windows, length - 1].

    Over the tokens that both name among their likeliest, all others taken as one: by the data-processing inequality
    never more than the KL of the whole distributions, and equal to it where the likeliest are the vocabulary.
    """
    shape = ours.logprobs.shape
    rows = zip(
        *(array.reshape(-1, array.shape[-1]) for array in (ours.top_ids, ours.top_logprobs)),
        *(array.reshape(-1, array.shape[-1]) for array in (theirs.top_ids, theirs.top_logprobs)),
        strict=True,
    )
    return np.array([_row_divergence(*row) for row in rows]).reshape(shape)


def _row_divergence(ids: Floats, logprobs: Floats, other_ids: Floats, other_logprobs: Floats) -> float:
    _, here, there = np.intersect1d(ids, other_ids, assume_unique=True, return_indices=True)
    log_p, log_q = logprobs[here], other_logprobs[there]
    shared = float(np.exp(log_p) @ (log_p - log_q))
    rest, other_rest = (max(0.0, 1 - float(np.exp(one).sum())) for one in (log_p, log_q))
    # Logarithms in single precision leave a rest of about this where there is none.
    if rest < 1e-6 or other_rest < 1e-6:
        return max(0.0, shared)
    return max(0.0, shared + rest * float(np.log(rest / other_rest)))


def agreement(ours: Predictions, theirs: Predictions) -> Floats:
    """1 where both hold the same token for the likeliest, else 0."""
    return np.asarray(ours.top_ids[..., 0] == theirs.top_ids[..., 0], np.float64)


def perplexity(logprobs: Floats) -> float:
    """exp of the mean negative log-probability."""
    return float(np.exp(-logprobs.mean()))


def estimate(statistic: Callable[[Floats], float], values: Floats) -> Estimate:
    """A statistic of [windows, ...] with its bootstrap interval (percentiles; Efron 1979), the same every time."""
    draw = np.random.default_rng(0)
    found = [statistic(values[draw.integers(0, len(values), len(values))]) for _ in range(RESAMPLES)]
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(found, (tail, 100 - tail))
    return Estimate(statistic(values), float(low), float(high))
