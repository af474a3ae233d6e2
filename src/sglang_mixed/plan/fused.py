"""Parts that an engine would run as one matrix: what it costs where they are stored differently."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import lru_cache

from ..formats import ModuleFormat, label_of
from ..patterns import parse_pattern
from .families import expert_of, fused_matrices
from .fold import fold
from .plan import PlannedModule
from .resolve import Assignment

Group = tuple[str, str]


def split_notices(modules: Mapping[str, PlannedModule]) -> list[str]:
    """What it costs that parts of one matrix, or experts of one layer, are stored differently; told once each."""
    firsts: dict[Group, ModuleFormat] = {}
    others: dict[Group, dict[int, ModuleFormat]] = {}
    for name, _, module_format, _, _ in modules.values():
        group = running_together(name)
        if group is not None and firsts.setdefault(group, module_format) is not module_format:
            others.setdefault(group, {})[id(module_format)] = module_format
    linears: dict[str, int] = {}
    layers: dict[str, int] = {}
    for group, found in others.items():
        parent, matrix = group
        if (kinds := _kinds([firsts[group], *found.values()])) > 1:
            (layers if parent.endswith("experts") else linears)[f"{parent}.{matrix}"] = kinds
    notices = []
    if linears:
        notices.append(
            f"parts of one matrix are in several formats ({_shown(linears)}): each runs by itself, "
            f"{sum(linears.values()) - len(linears)} more kernel launches a step"
        )
    if layers:
        notices.append(
            f"experts of one layer are in several formats ({_shown(layers)}): "
            "on a GPU our own kernel runs them all in the kernel launches of one, and keeps activations in 16 bits"
        )
    return notices


def _kinds(formats: Iterable[ModuleFormat]) -> int:
    """How many of the formats cannot run as one matrix."""
    distinct: list[ModuleFormat] = []
    for one in formats:
        if not any(are_alike(one, other) for other in distinct):
            distinct.append(one)
    return len(distinct)


def _shown(names: Mapping[str, int]) -> str:
    patterns = fold(names)
    return ", ".join(patterns[:3]) + (f", and {len(patterns) - 3} more" if len(patterns) > 3 else "")


def running_together(name: str) -> Group | None:
    """The group whose members would run as one: a fused matrix, or all experts' matrices of a kind in one layer."""
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


def describe(names: list[str], modules: Mapping[str, PlannedModule], assignment: Assignment) -> list[str]:
    """What each of these modules is, and which line of the map decided it, folded."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        planned = modules[name]
        label = label_of(planned.format)
        groups.setdefault((f"{planned.source}, {label}", assignment.reason(name)), []).append(name)
    return [f"{', '.join(fold(group))}: {what} ({reason})" for (what, reason), group in groups.items()]


def advise(names: list[str], source: str, assignment: Assignment) -> str:
    """The lines to add to `weight_mapping` that give all of `names` to `source`."""
    lines = "".join(f'\n    "{pattern}": {source}' for pattern in fold(names))
    rules = {rule for name in names if (rule := assignment.rules[name]) and rule.source != source}
    exact = sorted(rule.line for rule in rules if parse_pattern(rule.pattern).exact)
    delete = (
        f"\n  and delete the exact names that would override them, lines {', '.join(map(str, exact))}" if exact else ""
    )
    return f"add at the end of weight_mapping:{lines}{delete}"
