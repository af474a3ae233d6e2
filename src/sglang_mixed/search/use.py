"""Errors weighted by how much each expert is used: one that no token meets may be as coarse as it likes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ..errors import ExpertCountsError, SensitivityError
from ..experts import ExpertExport
from ..plan.candidates import Candidates, Unit
from ..plan.families import expert_of, layer_of, num_experts, text_config
from ..sensitivity import Measure, Sensitivity

#: (unit, source) -> error.
Errors = dict[tuple[str, str], float]
Shares = NDArray[np.float64]
#: Tokens' worth of its layer's mean error a use that an expert's own measurement is mixed with: one that the text
#: hardly met would otherwise count as free of error.
PRIOR_TOKENS = 32


def weighted_errors(candidates: Candidates, sensitivity: Sensitivity, traffic: ExpertExport | None = None) -> Errors:
    """What each choice adds to the error of a mix.

    Errors of weights count by the share of the tokens that meet them: 1, of an expert its share in `traffic`, or
    top-k / experts. A divergence was measured on a text and holds that text's shares: `traffic` puts its own in place.
    Raises ExpertCountsError for counts of another model, SensitivityError where an error was not measured.
    """
    errors = {
        (unit.name, source): sensitivity.error(unit, source)
        for unit in candidates.units.values()
        for source in unit.choices
    }
    places = {name: place for name, unit in candidates.units.items() if (place := _expert(unit))}
    shares = _traffic_shares(candidates, traffic, {owner for owner, _ in places.values()}) if traffic else {}
    if sensitivity.measure is not Measure.DIVERGENCE:
        usual = _top_k(candidates) / max(1, num_experts(candidates.plan.checkpoints[candidates.base].config))
        for (name, source), error in errors.items():
            if name in places:
                owner, number = places[name]
                errors[name, source] = error * (float(shares[owner][number]) if traffic else usual)
    elif traffic:
        _put_in_place(errors, places, shares, sensitivity)
    return errors


def _put_in_place(
    errors: Errors, places: Mapping[str, tuple[str, int]], shares: Mapping[str, Shares], sensitivity: Sensitivity
) -> None:
    """Each expert's error a use, times its uses in the traffic."""
    tokens = int(sensitivity.details.get("tokens", 0)) or 1
    layers: dict[tuple[str, str], list[str]] = {}
    for name, source in errors:
        if name in places:
            if places[name][0] not in sensitivity.uses:
                raise SensitivityError(
                    "the measurement did not count how its text used these experts",
                    tensor=places[name][0],
                    rule="a divergence is moved to other traffic by the ratio of both uses",
                    remedy="plan without --experts, or with errors of the weights: sensitivity without --text",
                )
            layers.setdefault((places[name][0], source), []).append(name)
    for (owner, source), names in layers.items():
        uses = np.array([sensitivity.uses[owner][places[name][1]] for name in names])
        found = np.array([errors[name, source] for name in names])
        mean = found.sum() / max(uses.sum(), 1 / tokens)
        per_use = (found * tokens + PRIOR_TOKENS * mean) / (uses * tokens + PRIOR_TOKENS)
        for name, error in zip(names, per_use, strict=True):
            errors[name, source] = float(error * shares[owner][places[name][1]])


def _traffic_shares(candidates: Candidates, traffic: ExpertExport, owners: set[str]) -> dict[str, Shares]:
    """`...experts` -> for each expert the share of the traffic's tokens that met it, one imagined token each added."""
    layers, grid = traffic.grid()
    rows = {layer: row for row, layer in enumerate(layers)}
    experts = num_experts(candidates.plan.checkpoints[candidates.base].config)
    found = {}
    for owner in owners:
        layer = layer_of(owner)
        if layer not in rows or grid.shape[1] > experts:
            raise ExpertCountsError(
                f"counts of layers {list(layers)[:8]} with {grid.shape[1]} experts",
                tensor=owner,
                rule=f"counts of every layer that has experts, {experts} of them",
                remedy="give the export of a server that ran this model",
            )
        counts = np.zeros(experts)
        counts[: grid.shape[1]] = grid[rows[layer]]
        found[owner] = (counts + 1) / (counts.sum() + experts) * _top_k(candidates)
    return found


def _top_k(candidates: Candidates) -> int:
    config = text_config(candidates.plan.checkpoints[candidates.base].config)
    return int(config.get("num_experts_per_tok") or config.get("experts_per_token") or 1)


def _expert(unit: Unit) -> tuple[str, int] | None:
    return expert_of(unit.modules[0].rpartition(".")[0])
