"""How far each source's weights are from the 16-bit ones: streams, so that any size of model is measured."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from ..plan.candidates import Candidates
from ..plan.families import norm_readers
from .progress import Found, Progress
from .table import Measure, Sensitivity

#: Modules in work at once: one is read while another is computed.
WORKERS = 2


def measure_weights(
    candidates: Candidates,
    progress: Progress | None = None,
    advance: Callable[[int], object] = lambda modules: None,
) -> Sensitivity:
    """||W' - W||^2 / ||W||^2 of every module in every source, W being the base's; every byte is read once.

    Where a source folded smoothing into a norm, its weights are compared as they act behind the base's norm.
    At most twice `WORKERS` modules, in every source and in float32, are in memory. `advance` is told of each module.
    """
    progress = progress or Progress()
    smoothing = _smoothing(candidates)
    names = {name: sources for name, sources in wanted(candidates).items() if name not in progress.done}
    advance(len(progress.done))
    pending: deque[tuple[str, Future[Found]]] = deque()
    with ThreadPoolExecutor(WORKERS, "weight-error") as workers:
        for name, sources in names.items():
            pending.append((name, workers.submit(_errors, candidates, name, sources, smoothing)))
            if len(pending) == 2 * WORKERS:
                _take(pending, progress, advance)
        while pending:
            _take(pending, progress, advance)
    return Sensitivity(Measure.WEIGHT, candidates.base, progress.by_source())


def wanted(candidates: Candidates) -> dict[str, list[str]]:
    """Module -> the sources to measure it in, in the order of the base's files, which the others mostly have too."""
    found: dict[str, list[str]] = {}
    for unit in candidates.units.values():
        others = [source for source in unit.choices if source != candidates.base]
        found.update((name, others) for name in unit.modules)
    return {name: found[name] for name in candidates.checkpoints[candidates.base].modules if name in found}


def _take(pending: deque[tuple[str, Future[Found]]], progress: Progress, advance: Callable[[int], object]) -> None:
    name, job = pending.popleft()
    progress.save(name, job.result())
    advance(1)


def _errors(
    candidates: Candidates, name: str, sources: list[str], smoothing: dict[tuple[str, str], torch.Tensor]
) -> Found:
    weight = candidates.dequantize(candidates.base, name)
    norm = float(weight.double().square().sum())
    found = {}
    for source in sources:
        other = candidates.dequantize(source, name)
        if (factor := smoothing.get((source, name))) is not None:
            other *= factor
        error = float(other.sub_(weight).double().square().sum())
        found[source] = error / norm if norm else 0.0
    return found


def _smoothing(candidates: Candidates) -> dict[tuple[str, str], torch.Tensor]:
    """(source, module) -> what multiplies its columns, as its own norm does, behind the base's norm."""
    factors: dict[tuple[str, str], torch.Tensor] = {}
    for tie in candidates.ties:
        for norm in tie.followers:
            readers = norm_readers(norm, candidates.plan.modules)
            if not readers:
                continue  # a router, which follows its norm
            ours, theirs = (candidates.dequantize(source, norm) for source in (candidates.base, tie.source))
            factor = torch.where(ours == 0, 1.0, theirs / ours)
            factors |= {(tie.source, reader): factor for reader in readers}
    return factors
