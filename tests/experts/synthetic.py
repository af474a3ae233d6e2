"""Counts of a router that prefers some experts, drawn at random."""

from __future__ import annotations

import numpy as np

from sglang_mixed.experts import ExpertCounts


def counts(
    layers: tuple[int, ...] = (0, 1),
    experts: int = 8,
    top_k: int = 2,
    tokens: int = 100,
    seed: int = 0,
    since: float = 1_700_000_000.0,
    until: float = 1_700_000_060.5,
) -> ExpertCounts:
    """`tokens` tokens through each layer, two thirds of them in prefill; each goes to `top_k` different experts."""
    random = np.random.default_rng(seed)
    table = np.zeros((2, len(layers), experts), np.int64)
    for row in range(len(layers)):
        bias = random.normal(size=experts)
        scores = bias + random.gumbel(size=(tokens, experts))
        chosen = np.argsort(-scores, axis=1)[:, :top_k]
        for mode, part in enumerate((chosen[: tokens * 2 // 3], chosen[tokens * 2 // 3 :])):
            table[mode, row] = np.bincount(part.ravel(), minlength=experts)
    total = table.sum(axis=0)
    weights = total * random.uniform(0.1, 0.9, total.shape)
    last_active = np.where(total > 0, random.uniform(since, until, total.shape), 0)
    return ExpertCounts(layers, table[0], table[1], weights, last_active, since, until, top_k)
