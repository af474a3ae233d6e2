"""Many weight names as few patterns: `model.layers.{0..3}.mlp.experts.*.up_proj`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import groupby

from ..patterns import MAX_LENGTH

Indices = tuple[int, ...]
#: A product of sets of numbers, one for each place of a template.
Box = tuple[frozenset[int], ...]


def split_name(name: str) -> tuple[str, Indices]:
    """A name's template, its numbers replaced by `*`, and the numbers."""
    parent, _, last = name.rpartition(".")
    template, indices = _split_parent(parent) if parent else ("", ())
    number = last.isdecimal()
    text = "*" if number else last
    return f"{template}.{text}" if parent else text, (*indices, int(last)) if number else indices


#: Names share their parents.
_split_parent = lru_cache(maxsize=65_536)(split_name)


def by_template(names: Iterable[str]) -> dict[str, list[Indices]]:
    """Names by their template."""
    found: dict[str, list[Indices]] = {}
    for name in names:
        template, indices = split_name(name)
        found.setdefault(template, []).append(indices)
    return found


def fold(names: Iterable[str], within: Mapping[str, list[Indices]] | None = None) -> list[str]:
    """Patterns that match exactly these names; a number is `*` where every one that `within` knows is meant."""
    patterns = []
    for template, indices in by_template(names).items():
        patterns += fold_indices(template, indices, within[template] if within else [])
    return patterns


def fold_indices(template: str, indices: Iterable[Indices], within: Iterable[Indices]) -> list[str]:
    """As `fold`, of names that are one template and its numbers."""
    known = [set(column) for column in zip(*within, strict=True)]
    pieces = template.split("*")
    return [pattern for box in _boxes(set(indices)) for pattern in _write(pieces, box, known)]


def _write(pieces: list[str], box: Box, known: list[set[int]]) -> list[str]:
    """The box as a pattern; as several where one would be longer than a map may hold."""
    texts = [
        "*" if known and len(values) > 1 and values == known[place] else _ranges(sorted(values))
        for place, values in enumerate(box)
    ]
    text = "".join(piece + text for piece, text in zip(pieces, [*texts, ""], strict=True))
    divisible = [place for place, values in enumerate(box) if len(values) > 1]
    if len(text) <= MAX_LENGTH or not divisible:
        return [text]
    place = max(divisible, key=lambda place: len(texts[place]))
    values = sorted(box[place])
    halves = values[: len(values) // 2], values[len(values) // 2 :]
    return [
        pattern
        for half in halves
        for pattern in _write(pieces, (*box[:place], frozenset(half), *box[place + 1 :]), known)
    ]


def _boxes(indices: set[Indices]) -> list[Box]:
    """Disjoint products of sets that together are `indices`."""
    if () in indices:
        return [()]
    lasts: dict[Indices, set[int]] = {}
    for index in indices:
        lasts.setdefault(index[:-1], set()).add(index[-1])
    prefixes: dict[frozenset[int], set[Indices]] = {}
    for prefix, last in lasts.items():
        prefixes.setdefault(frozenset(last), set()).add(prefix)
    boxes: list[Box] = [(*box, last) for last, group in prefixes.items() for box in _boxes(group)]
    return sorted(boxes, key=lambda box: [min(values) for values in reversed(box)])


def _ranges(values: list[int]) -> str:
    """`7`, `{0..3}`, `{0..3,7}`."""
    runs = []
    for _, group in groupby(enumerate(values), key=lambda pair: pair[1] - pair[0]):
        run = [value for _, value in group]
        runs.append(f"{run[0]}..{run[-1]}" if len(run) > 1 else str(run[0]))
    return runs[0] if len(values) == 1 else "{" + ",".join(runs) + "}"
