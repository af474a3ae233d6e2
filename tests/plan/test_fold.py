"""Folding names into patterns is exact: the patterns match the names and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_mixed.patterns import NameTree, parse_pattern
from sglang_mixed.plan.fold import by_template, fold


def names(layers: object, experts: object) -> list[str]:
    return [f"m.{layer}.e.{expert}.up" for layer in layers for expert in experts]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("given_names", "expected"),
    [
        (["lm_head"], ["lm_head"]),
        (["m.3.e.0.up"], ["m.3.e.0.up"]),
        (names(range(4), range(3)), ["m.{0..3}.e.{0..2}.up"]),
        (names([0, 1, 2, 9], [5]), ["m.{0..2,9}.e.5.up"]),
        (names([0], [0, 1]) + names([1], [0]), ["m.1.e.0.up", "m.0.e.{0..1}.up"]),
        (["a.1.b", "a.2.c"], ["a.1.b", "a.2.c"]),
    ],
)
def test_how_names_fold(given_names: list[str], expected: list[str]) -> None:
    assert sorted(fold(given_names)) == sorted(expected)


def test_a_star_where_every_known_number_is_meant() -> None:
    known = by_template(names(range(4), range(3)))
    assert fold(names(range(4), range(3)), known) == ["m.*.e.*.up"]
    assert fold(names([1, 2], range(3)), known) == ["m.{1..2}.e.*.up"]
    assert fold(["lm_head"], by_template(["lm_head"])) == ["lm_head"]


def test_patterns_are_never_longer_than_a_map_may_hold() -> None:
    wanted = names(range(0, 600, 2), range(0, 400, 3))
    patterns = fold(wanted)
    tree = NameTree(names(range(601), range(401)), lambda _: ("weight",))
    assert len(patterns) > 1
    assert sorted(name for one in patterns for name in tree.match(parse_pattern(one))) == sorted(wanted)


numbers = st.integers(0, 4)


@given(st.sets(st.tuples(numbers, numbers)))
def test_the_patterns_match_exactly_these_names(chosen: set[tuple[int, int]]) -> None:
    tree = NameTree(names(range(5), range(5)), lambda _: ("weight",))
    matched = [
        name for pattern in fold(f"m.{a}.e.{b}.up" for a, b in chosen) for name in tree.match(parse_pattern(pattern))
    ]
    assert sorted(matched) == sorted(f"m.{a}.e.{b}.up" for a, b in chosen)
