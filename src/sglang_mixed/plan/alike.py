"""Modules that differ only in their numbers and last names, as rows of a table."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple

from ..checkpoint import join
from .fold import Indices, fold_indices, split_name

#: A module below its parent: last name part, key, sizes.
_Child = tuple[str, Hashable, tuple[int, ...]]


class Alike(NamedTuple):
    """Modules of one key: their names as patterns, their number, and the sums of their sizes."""

    names: str
    key: Any
    number: int
    sizes: tuple[int, ...]


def alike(modules: Iterable[tuple[str, Hashable, tuple[int, ...]]]) -> list[Alike]:
    """Rows of (name, key, sizes), in the order in which their first modules come.

    Parents with the same children are taken together, so that 100,000 names cost little more than their parents.
    """
    families: dict[str, list[_Child]] = {}
    for name, key, sizes in modules:
        parent, _, last = name.rpartition(".")
        families.setdefault(parent, []).append((last, key, sizes))
    known: dict[str, list[Indices]] = {}
    kinds: dict[tuple[str, tuple[_Child, ...]], list[Indices]] = {}
    for parent, children in families.items():
        template, indices = split_name(parent)
        known.setdefault(template, []).append(indices)
        kinds.setdefault((template, tuple(children)), []).append(indices)
    places: dict[tuple[str, str, Hashable], list[int]] = {}
    for number, (template, kind) in enumerate(kinds):
        for last, key, _ in kind:
            places.setdefault((template, last, key), []).append(number)
    rows: dict[tuple[str, Hashable, tuple[int, ...]], list[str]] = {}
    for (template, last, key), numbers in places.items():
        rows.setdefault((template, key, tuple(numbers)), []).append(last)
    members = [(kind, indices) for (_, kind), indices in kinds.items()]
    return [
        _row(template, key, lasts, [members[number] for number in numbers], known[template])
        for (template, key, numbers), lasts in rows.items()
    ]


def _row(
    template: str,
    key: Hashable,
    lasts: list[str],
    kinds: list[tuple[tuple[_Child, ...], list[Indices]]],
    known: list[Indices],
) -> Alike:
    parents = fold_indices(template, [index for _, indices in kinds for index in indices], known)
    last = lasts[0] if len(lasts) == 1 else "{" + ",".join(sorted(lasts)) + "}"
    wanted = set(lasts)
    sizes = [
        [value * len(indices) for value in size]
        for kind, indices in kinds
        for name, its_key, size in kind
        if name in wanted and its_key == key
    ]
    number = len(lasts) * sum(len(indices) for _, indices in kinds)
    return Alike(
        ", ".join(join(parent, last) for parent in parents), key, number, tuple(map(sum, zip(*sizes, strict=True)))
    )
