"""From a map to a checked Plan. Every check runs before a weight is loaded; only samples of norms are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from ..checkpoint import Checkpoint, open_checkpoint
from ..checkpoint.folder import read_config
from ..checkpoint.pause import collector_paused
from ..config import MixedPrecisionMap, load_map, locate
from .cover import cover
from .fused import split_notices
from .plan import Plan, file_times, fingerprint
from .resolve import Assignment, assign, default_source, idle_rules, source_at
from .same_base import Comparison, check_configs, compare_weights, different_base
from .sixteen_bits import check_16_bits
from .smoothing import check_smoothing


def make_plan(
    described: MixedPrecisionMap | str | Path, *, base: str | Path | None = None, allow_different_base: bool = False
) -> Plan:
    """Resolve a map over its sources and check that together they are one model.

    `base` is the engine's --model-path, a folder or a hub name in the local cache. Raises what `errors` draws below
    MapError, CheckpointError, FormatError and PlanError, or UnsupportedError.
    """
    if not isinstance(described, MixedPrecisionMap):
        described = load_map(described)
    if allow_different_base:
        described = dataclasses.replace(described, allow_different_base=True)
    with collector_paused():
        return _make(described, locate(str(base), Path.cwd()) if base is not None else None)


def _make(described: MixedPrecisionMap, base: Path | None) -> Plan:
    default = default_source(described, base)
    reference = source_at(described, base) or default
    opened = {reference: open_checkpoint(described.sources[reference])}
    assignment = assign(described, default, opened[reference])
    giving = assignment.used
    used = [name for name in described.sources if name in giving or name == reference]
    checkpoints = {name: opened.get(name) or open_checkpoint(described.sources[name]) for name in used}
    if not described.allow_different_base:
        configs = {one.path: one.config for one in checkpoints.values()}
        if base is not None and base not in configs:
            configs[base] = read_config(base)
        check_configs(checkpoints[reference].path, checkpoints[reference].config, configs)
    modules, warnings = cover(reference, checkpoints, assignment)
    check_16_bits(modules, checkpoints, assignment)
    compared, differing = _compare(reference, checkpoints, described.allow_different_base)
    check_smoothing(compared, modules, assignment)
    warnings = [*_notices(described, assignment, checkpoints), *split_notices(modules), *differing, *warnings]
    return Plan(
        described,
        reference,
        {name: described.sources[name] for name in used},
        modules,
        tuple(warnings),
        fingerprint(described, reference, checkpoints),
        checkpoints,
        file_times(checkpoints),
    )


def _compare(
    reference: str, checkpoints: Mapping[str, Checkpoint], allow_different: bool
) -> tuple[dict[str, Comparison], list[str]]:
    """What each source changed in its norms, and warnings for sources that are allowed to be another model's."""
    compared, differing = {}, []
    others = {source: one for source, one in checkpoints.items() if source != reference}
    for source, comparison in compare_weights(checkpoints[reference], others).items():
        if not comparison.others:
            compared[source] = comparison
        elif not allow_different:
            raise different_base(source, reference, checkpoints[source], comparison)
        else:
            differing.append(f"{source} is another model than {reference}: {next(iter(comparison.others))} differs")
    return compared, differing


def _notices(described: MixedPrecisionMap, assignment: Assignment, checkpoints: Mapping[str, Checkpoint]) -> list[str]:
    unused = [name for name in described.sources if name not in checkpoints]
    notices = [f"source {name!r} is declared and gives no weight" for name in unused]
    for rule in assignment.foreign:
        found = "a dense MLP" if ".experts." in rule.pattern else "experts"
        notices.append(f'line {rule.line} "{rule.pattern}" maps nothing: that layer of the model has {found}')
    for rule in idle_rules(described, assignment):
        notices.append(f'line {rule.line} "{rule.pattern}" has no effect: later or exact lines override it everywhere')
    return notices
