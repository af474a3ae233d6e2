"""A choice as a short YAML map: the commonest source of every kind of module first, then what differs from it."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..patterns import MAX_LENGTH, NameTree, parse_pattern
from ..plan import Plan, make_plan
from ..plan.fold import Indices, by_template, fold, split_name
from .mix import Mix, Search

#: YAML reads these words as something else than text.
_YAML_WORDS = frozenset(("null", "true", "false", "yes", "no", "on", "off", "y", "n"))


class Line(NamedTuple):
    """One rule; `names`: the modules that it decides in the end; `instead`: where they came from without it."""

    pattern: str
    source: str
    names: tuple[str, ...]
    instead: str


def map_text(search: Search, mix: Mix, heading: Iterable[str], folder: Path) -> str:
    """The YAML of a mix for a file in `folder`, each line with what it costs and what it saves."""
    plan = search.plan(mix)
    text = [*(f"# {line}" for line in heading), "mixed_precision:"]
    for name in plan.sources:
        text.append(f"  {name}_path: {json.dumps(_relative(plan.sources[name], folder))}")
    text.append(f"  default: {_scalar(plan.base)}")
    lines = map_lines(plan)
    if lines:
        text.append("  weight_mapping:")
    for line in lines:
        text.append(f"    # {_reason(line, search, mix, plan)}")
        text.append(f"    {json.dumps(line.pattern)}: {_scalar(line.source)}")
    return "\n".join(text) + "\n"


def resolves_to(path: Path, plan: Plan) -> bool:
    """Whether a map's file chooses just what the plan chooses, and passes every check."""
    found = make_plan(path, allow_different_base=plan.map.allow_different_base)
    return found.base == plan.base and found.modules == plan.modules


def map_lines(plan: Plan) -> list[Line]:
    """Rules that, one after another, give every module of a plan its source; the base gives what none names."""
    known = by_template(plan.modules)
    kinds: dict[str, list[str]] = {}
    for name in plan.modules:
        kinds.setdefault(split_name(name)[0], []).append(name)
    broad: dict[tuple[str, str, str], dict[str, list[str]]] = {}
    narrow: dict[tuple[str, str, str], dict[str, list[str]]] = {}
    for template, names in kinds.items():
        usual = Counter(plan.modules[name].source for name in names).most_common(1)[0][0]
        by_source: dict[str, list[str]] = {}
        for name in names:
            by_source.setdefault(plan.modules[name].source, []).append(name)
        if usual != plan.base:
            _collect(broad, [template], usual, plan.base, {template: by_source[usual]})
        for source, exceptions in by_source.items():
            if source != usual:
                pieces = _pieces(exceptions, known)
                _collect(narrow, list(pieces), source, usual, pieces)
    return [*_merged(broad), *_merged(narrow)]


def _collect(
    table: dict[tuple[str, str, str], dict[str, list[str]]],
    patterns: list[str],
    source: str,
    instead: str,
    names: Mapping[str, Sequence[str]],
) -> None:
    for pattern in patterns:
        parent, _, last = pattern.rpartition(".")
        table.setdefault((parent, source, instead), {}).setdefault(last, []).extend(names[pattern])


def _merged(table: Mapping[tuple[str, str, str], Mapping[str, list[str]]]) -> list[Line]:
    """Lines that differ in their last name part only, as one."""
    lines = []
    for (parent, source, instead), lasts in table.items():
        last = next(iter(lasts)) if len(lasts) == 1 else "{" + ",".join(sorted(lasts)) + "}"
        names = tuple(name for found in lasts.values() for name in found)
        lines.append(Line(f"{parent}.{last}" if parent else last, source, names, instead))
    return lines


def _pieces(names: Sequence[str], known: Mapping[str, list[Indices]]) -> dict[str, list[str]]:
    """Pattern -> the names that it stands for; names whose pattern would be too long are halved."""
    found: dict[str, list[str]] = {}
    for pattern, matched in _folded(names, known).items():
        if len(pattern) <= MAX_LENGTH // 2 or len(matched) == 1:
            found[pattern] = matched
        else:
            middle = len(matched) // 2
            found |= _pieces(matched[:middle], known) | _pieces(matched[middle:], known)
    return found


def _folded(names: Sequence[str], known: Mapping[str, list[Indices]]) -> dict[str, list[str]]:
    patterns = fold(names, known)
    if len(patterns) == 1:
        return {patterns[0]: list(names)}
    tree = NameTree(names, lambda _: ())
    return {pattern: tree.match(parse_pattern(pattern)) for pattern in patterns}


def _reason(line: Line, search: Search, mix: Mix, plan: Plan) -> str:
    nbytes = sum(plan.module_bytes(plan.modules[name]) for name in line.names)
    reason = f"{len(line.names)} modules, {nbytes / 2**20:,.1f} MiB"
    ours, theirs = (search.error_of(line.names, source) for source in (line.source, line.instead))
    if ours is None or theirs is None or not mix.error:
        return reason
    whole = mix.error
    return f"{reason}: {ours / whole:.2%} of the error, {theirs / whole:.2%} from {line.instead}"


def _relative(path: Path, folder: Path) -> str:
    """Relative where the source lies beside or below the map, so that both can be moved together."""
    relative = os.path.relpath(path, folder)
    return str(path) if relative.startswith(os.path.join("..", "..")) else relative  # noqa: PTH118


def _scalar(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z_]\w*", name) and name.lower() not in _YAML_WORDS else json.dumps(name)
