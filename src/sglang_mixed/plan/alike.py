"""Modules that differ only in their numbers and last names, as rows of a table in a model's order."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple

from ..checkpoint import join
from .families import model_order
from .fold import Indices, fold_indices, split_name


class Group(NamedTuple):
    """Modules of one key and of equal sizes."""

    key: Hashable
    sizes: tuple[int, ...]
    names: list[str]


class Alike(NamedTuple):
    """Modules of one key: their names as patterns, their number, and the sums of their sizes."""

    names: str
    key: Any
    number: int
    sizes: tuple[int, ...]


class _Child(NamedTuple):
    """What stands below several parents: last name part, and its group."""

    last: str
    group: Group


def alike(groups: Iterable[Group]) -> list[Alike]:
    """The modules of these groups, those of one key together.

    Parents with the same children are taken together, so that 100,000 names cost little more than their parents.
    """
    children: list[_Child] = []
    #: Parent -> numbers of its children.
    families: dict[str, list[int]] = {}
    for group in groups:
        numbers: dict[str, int] = {}
        for name in group.names:
            parent, _, last = name.rpartition(".")
            if last not in numbers:
                numbers[last] = len(children)
                children.append(_Child(last, group))
            families.setdefault(parent, []).append(numbers[last])
    known: dict[str, list[Indices]] = {}
    kinds: dict[tuple[str, tuple[int, ...]], list[Indices]] = {}
    for parent, family in families.items():
        template, indices = split_name(parent)
        known.setdefault(template, []).append(indices)
        kinds.setdefault((template, tuple(family)), []).append(indices)
    places: dict[tuple[str, str, Hashable], list[int]] = {}
    for number, (template, kind) in enumerate(kinds):
        for child in kind:
            places.setdefault((template, children[child].last, children[child].group.key), []).append(number)
    rows: dict[tuple[int, str, Hashable, tuple[int, ...]], list[str]] = {}
    for (template, last, key), numbers_of_kinds in places.items():
        order = model_order(join(template, last))
        rows.setdefault((order, template, key, tuple(numbers_of_kinds)), []).append(last)
    members = [([children[child] for child in kind], indices) for (_, kind), indices in kinds.items()]
    return [
        _row(template, key, lasts, [members[number] for number in numbers], known[template])
        for (_, template, key, numbers), lasts in sorted(rows.items(), key=lambda row: row[0][0])
    ]


def _row(
    template: str,
    key: Hashable,
    lasts: list[str],
    kinds: list[tuple[list[_Child], list[Indices]]],
    known: list[Indices],
) -> Alike:
    parents = fold_indices(template, [index for _, indices in kinds for index in indices], known)
    last = lasts[0] if len(lasts) == 1 else "{" + ",".join(sorted(lasts)) + "}"
    sizes = [
        [value * len(indices) for value in child.group.sizes]
        for children, indices in kinds
        for child in children
        if child.last in lasts and child.group.key == key
    ]
    number = len(lasts) * sum(len(indices) for _, indices in kinds)
    return Alike(
        ", ".join(join(parent, last) for parent in parents), key, number, tuple(map(sum, zip(*sizes, strict=True)))
    )
