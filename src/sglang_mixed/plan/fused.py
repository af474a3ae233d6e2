"""Parts that the engine runs as one matrix must be stored alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import lru_cache

from ..checkpoint import Checkpoint
from ..errors import FusedGroupError
from ..formats import ModuleFormat, get_format
from ..patterns import parse_pattern
from .families import expert_of, fused_matrices
from .fold import fold
from .plan import PlannedModule
from .resolve import Assignment

Group = tuple[str, str]


def check_fused_groups(
    modules: Mapping[str, PlannedModule], assignment: Assignment, checkpoints: Mapping[str, Checkpoint]
) -> None:
    """Raise FusedGroupError, with the lines to add, where parts of one matrix differ in format or parameters."""
    firsts: dict[Group, PlannedModule] = {}
    broken: dict[Group, None] = {}
    for module in modules.values():
        group = running_together(module.name)
        if group is not None:
            first = firsts.setdefault(group, module)
            if first.format is not module.format and not are_alike(first.format, module.format):
                broken[group] = None
    if broken:
        raise _disagreement(broken, modules, assignment, checkpoints)


def running_together(name: str) -> Group | None:
    """The group whose members must be alike today: a fused matrix, or all experts' matrices of a kind in one layer."""
    parent, _, last = name.rpartition(".")
    owner, matrices = _owner(parent)
    matrix = matrices.get(last)
    return (owner, matrix) if matrix else None


@lru_cache(maxsize=65_536)
def _owner(parent: str) -> tuple[str, Mapping[str, str]]:
    """What the matrices below a parent belong to (all experts of a layer to one), and which parts they have."""
    expert = expert_of(parent)
    return (expert[0] if expert else parent), fused_matrices(parent)


@lru_cache(maxsize=65_536)
def are_alike(one: ModuleFormat, other: ModuleFormat) -> bool:
    """Whether two weights can be parts of one matrix: same format and parameters, whatever their number of rows."""
    return one.name == other.name and _parameters(one) == _parameters(other)


def _parameters(module_format: ModuleFormat) -> tuple[object, ...]:
    if module_format.name == "plain":
        return ()  # the engine casts every plain weight to its own dtype
    parameters = module_format.parameters
    return tuple(getattr(parameters, one.name) for one in fields(parameters) if not one.name.endswith("_shape"))


def _disagreement(
    broken: Mapping[Group, None],
    modules: Mapping[str, PlannedModule],
    assignment: Assignment,
    checkpoints: Mapping[str, Checkpoint],
) -> FusedGroupError:
    members: dict[Group, list[str]] = {group: [] for group in broken}
    for name in modules:
        group = running_together(name)
        if group in members:
            members[group].append(name)
    (parent, matrix), names = next(iter(members.items()))
    everything = [name for group in members.values() for name in group]
    listing = "".join(f"\n    {line}" for line in describe(names, modules, assignment))
    more = f", and {len(broken) - 1} more such groups" if len(broken) > 1 else ""
    return FusedGroupError(
        f"parts of {parent}.{matrix} are stored differently{more}:{listing}",
        file=checkpoints[modules[names[0]].source].path,
        tensor=f"{parent}.{matrix}",
        rule="q/k/v, gate/up, and the experts of one layer run as one matrix each: one format with equal parameters",
        remedy=advise(everything, _candidates(everything, modules, assignment, checkpoints), assignment),
    )


def describe(names: list[str], modules: Mapping[str, PlannedModule], assignment: Assignment) -> list[str]:
    """What each of these modules is, and which line of the map decided it, folded."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        planned = modules[name]
        label = get_format(planned.format.name).label(planned.format.parameters)
        groups.setdefault((f"{planned.source}, {label}", assignment.reason(name)), []).append(name)
    return [f"{', '.join(fold(group))}: {what} ({reason})" for (what, reason), group in groups.items()]


def advise(names: list[str], source: str | None, assignment: Assignment) -> str:
    """The lines to add to `weight_mapping` that give all of `names` to `source`."""
    if source is None:
        return "no source holds all of them in one format: make a checkpoint that does"
    lines = "".join(f'\n    "{pattern}": {source}' for pattern in fold(names))
    rules = {rule for name in names if (rule := assignment.rules[name]) and rule.source != source}
    exact = sorted(rule.line for rule in rules if parse_pattern(rule.pattern).exact)
    delete = (
        f"\n  and delete the exact names that would override them, lines {', '.join(map(str, exact))}" if exact else ""
    )
    return f"add at the end of weight_mapping:{lines}{delete}"


def _candidates(
    names: list[str],
    modules: Mapping[str, PlannedModule],
    assignment: Assignment,
    checkpoints: Mapping[str, Checkpoint],
) -> str | None:
    """The source to advise: one that holds all parts alike, the one of the map's latest line if it does."""
    mapped = {modules[name].source: assignment.rules[name] for name in names}
    by_line = sorted(mapped, key=lambda source: rule.line if (rule := mapped[source]) else 0, reverse=True)
    for source in [*by_line, *(name for name in checkpoints if name not in mapped)]:
        checkpoint = checkpoints[source]
        if all(name in checkpoint.modules for name in names) and _holds_alike(checkpoint, names):
            return source
    return None


def _holds_alike(checkpoint: Checkpoint, names: list[str]) -> bool:
    firsts: dict[Group | None, ModuleFormat] = {}
    for name in names:
        found = checkpoint.format(name)
        if not are_alike(firsts.setdefault(running_together(name), found), found):
            return False
    return True
