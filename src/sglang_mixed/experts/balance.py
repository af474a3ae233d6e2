"""How evenly a layer's tokens are spread over its experts. Counts are [..., experts]; results drop the last axis.

A layer without tokens has no balance: NaN.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def gini(counts: ArrayLike) -> Floats:
    """Gini coefficient: 0 where every expert gets as much, (n - 1) / n where one of n gets all.

    Half the relative mean absolute difference, by the order statistics of Damgaard and Weiner (Ecology 81, 2000):
    sum((2 i - n - 1) x_i) / (n sum(x)), x ascending, i from 1.
    """
    ascending = np.sort(np.asarray(counts, np.float64), axis=-1)
    experts = ascending.shape[-1]
    ranks = 2 * np.arange(1, experts + 1) - experts - 1
    return _ratio(ascending @ ranks, experts * ascending.sum(axis=-1))


def top_share(counts: ArrayLike, fraction: float = 0.1) -> Floats:
    """The share of the tokens that go to the hottest `fraction` of the experts, rounded up to whole experts."""
    ascending = np.sort(np.asarray(counts, np.float64), axis=-1)
    hottest = int(np.ceil(fraction * ascending.shape[-1]))
    return _ratio(ascending[..., ascending.shape[-1] - hottest :].sum(axis=-1), ascending.sum(axis=-1))


def effective_experts(counts: ArrayLike) -> Floats:
    """How many equally busy experts would be as diverse: exp of Shannon's entropy (Jost, Oikos 113, 2006), 1 to n."""
    values = np.asarray(counts, np.float64)
    shares = _ratio(values, values.sum(axis=-1, keepdims=True))
    logarithms = np.log(np.where(shares > 0, shares, 1))
    return np.asarray(np.exp(-(shares * logarithms).sum(axis=-1)), np.float64)


def _ratio(parts: Floats, whole: Floats) -> Floats:
    ratio = np.full(np.broadcast(parts, whole).shape, np.nan)
    np.divide(parts, whole, out=ratio, where=whole > 0)
    return ratio
