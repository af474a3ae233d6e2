"""The comparison as JSON values."""

from __future__ import annotations

from typing import Any

import numpy as np

from .server import Floats, Predictions
from .statistics import agreement, divergence, estimate, perplexity


def compare_predictions(ours: Predictions, theirs: Predictions) -> dict[str, Any]:
    """Perplexity of both, KL(A || B) and top-1 agreement, each {value, low, high}, and the divergences by quantile."""
    distances = divergence(ours, theirs)
    both = np.stack((ours.logprobs, theirs.logprobs), axis=1)
    quantiles = (1, 5, 25, 50, 75, 95, 99)
    return {
        "windows": len(distances),
        "predictions": distances.size,
        "top": ours.top_ids.shape[-1],
        "perplexity": [estimate(perplexity, one.logprobs)._asdict() for one in (ours, theirs)],
        "perplexity_ratio": estimate(_ratio, both)._asdict(),
        "divergence": estimate(_mean, distances)._asdict(),
        "divergence_p99": estimate(_p99, distances)._asdict(),
        "top_1_agreement": estimate(_mean, agreement(ours, theirs))._asdict(),
        "divergence_quantiles": {str(q): float(np.percentile(distances, q)) for q in quantiles},
        "divergence_by_window": distances.mean(axis=1).tolist(),
    }


def _mean(values: Floats) -> float:
    return float(values.mean())


def _p99(values: Floats) -> float:
    return float(np.percentile(values, 99))


def _ratio(both: Floats) -> float:
    return float(np.exp((both[:, 0] - both[:, 1]).mean()))
