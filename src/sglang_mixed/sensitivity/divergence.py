"""How far the model's predictions move when one unit comes from another source: measured, each unit by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..plan.candidates import Candidates
from ..plan.families import layer_of
from .model import ReferenceModel
from .progress import Found, Progress
from .table import Measure, Sensitivity


def measure_divergence(
    candidates: Candidates,
    windows: torch.Tensor,
    progress: Progress | None = None,
    advance: Callable[[int], object] = lambda units: None,
    details: Mapping[str, Any] | None = None,
) -> Sensitivity:
    """KL(base || with one unit replaced), mean nats a token over the text; units that are tied are replaced together.

    To second order the KL of a mix is the sum of its units', where their roundings are independent. `windows`: token
    ids [count, length]. `advance` is told of each unit.
    """
    progress = progress or Progress()
    advance(len(progress.done))
    model = ReferenceModel(candidates, windows)
    for name in sorted(candidates.units, key=layer_of):
        if name not in progress.done:
            progress.save(name, _errors(candidates, model, name))
            advance(1)
    measured = {"tokens": windows.numel(), "window": windows.shape[1], **(details or {})}
    return Sensitivity(Measure.DIVERGENCE, candidates.base, progress.by_source(), model.expert_uses(), measured)


def _errors(candidates: Candidates, model: ReferenceModel, name: str) -> Found:
    found = {}
    for source in candidates.units[name].choices:
        if source == candidates.base:
            continue
        together = next((tie for tie in candidates.ties if tie.source == source and name in tie.units), None)
        units = together.units if together else (name,)
        modules = [one for unit in units for one in candidates.units[unit].modules]
        followers = together.followers if together else ()
        weights = {one: candidates.dequantize(source, one) for one in (*modules, *followers)}
        with model.replaced(weights):
            divergence = model.divergence(min(map(layer_of, weights)))
        # All or none of a tie's units are taken, so that only their sum counts.
        found[source] = float(divergence.double().mean()) / len(units)
    return found
