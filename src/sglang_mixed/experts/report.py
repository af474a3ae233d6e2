"""The JSON of `GET /mixed_precision/experts`, which the page draws. Pure: from values to a value."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import MixedPrecisionMap
from ..errors import ExpertCountsError
from .balance import effective_experts, gini, top_share
from .counts import Counts, ExpertCounts
from .formats import ExpertFormats
from .statistics import activities, top_experts

#: Why nothing is counted -> what the page and the command line say of it.
REASONS = {
    "disabled": "expert tracking is off: the server was started with --disable-expert-tracking",
    "no_experts": "the model has no experts: there is nothing to count",
}


def report(
    counts: ExpertCounts,
    formats: ExpertFormats | None = None,
    described: MixedPrecisionMap | None = None,
    *,
    layer: int | None = None,
    top: int = 10,
) -> dict[str, Any]:
    """Everything that is counted, or what concerns one layer, as compact JSON values.

    `prefill`, `decode`: tokens [layers][experts]; `weights`: sums of router weights to 6 digits; `last_active`: whole
    unix seconds, 0 for never; `formats`: {labels, cells} with cells as numbers into labels; `balance`: per phase
    (`total`, `prefill`, `decode`) gini, top_10_percent and effective_experts per layer, null for a layer without
    tokens; `top_experts`: the `top` most active, with `share` of their layer's activations and `format`.
    Raises ExpertCountsError for a layer without experts.
    """
    rows = _rows(counts, layer)
    return {
        "state": "counting",
        "since": counts.since,
        "until": counts.until,
        "top_k": counts.top_k,
        "experts": counts.experts,
        "layers": [counts.layers[row] for row in rows],
        "prefill": counts.prefill[rows].tolist(),
        "decode": counts.decode[rows].tolist(),
        "weights": [[float(f"{weight:.6g}") for weight in row] for row in counts.weights[rows].tolist()],
        "last_active": counts.last_active[rows].astype(np.int64).tolist(),
        "formats": {"labels": list(formats.labels), "cells": formats.cells[rows].tolist()} if formats else None,
        "balance": {
            "total": _balance(counts.total[rows]),
            "prefill": _balance(counts.prefill[rows]),
            "decode": _balance(counts.decode[rows]),
        },
        "top_experts": _top(counts, formats, layer, top),
        "map": _map(described),
    }


def nothing_counted(state: str, described: MixedPrecisionMap | None = None) -> dict[str, Any]:
    """The report where nothing is counted. `state`: "disabled" or "no_experts"."""
    return {"state": state, "reason": REASONS[state], "map": _map(described)}


def _rows(counts: ExpertCounts, layer: int | None) -> list[int]:
    if layer is None:
        return list(range(len(counts.layers)))
    if layer not in counts.layers:
        known = ", ".join(map(str, counts.layers))
        raise ExpertCountsError(f"layer {layer} has no experts", rule="a layer with experts", remedy=f"one of: {known}")
    return [counts.layers.index(layer)]


def _balance(counts: Counts) -> dict[str, list[float | None]]:
    return {
        "gini": _rounded(gini(counts)),
        "top_10_percent": _rounded(top_share(counts)),
        "effective_experts": _rounded(effective_experts(counts)),
    }


def _rounded(values: NDArray[np.float64]) -> list[float | None]:
    return [None if np.isnan(value) else round(float(value), 6) for value in values]


def _top(counts: ExpertCounts, formats: ExpertFormats | None, layer: int | None, top: int) -> list[dict[str, Any]]:
    totals = dict(zip(counts.layers, counts.total.sum(axis=1).tolist(), strict=True))
    chosen = [one for one in activities(counts) if layer in (None, one.layer_id) and one.activation_count]
    return [
        {
            **expert,
            "share": round(expert["activation_count"] / totals[expert["layer_id"]], 6),
            "format": formats.label(counts.layers.index(expert["layer_id"]), expert["expert_id"]) if formats else None,
        }
        for expert in top_experts(chosen, top)
    ]


def _map(described: MixedPrecisionMap | None) -> dict[str, Any] | None:
    if described is None:
        return None
    return {
        "path": str(described.path),
        "sources": {name: str(path) for name, path in described.sources.items()},
        "default": described.default,
        "rules": [rule._asdict() for rule in described.rules],
    }
