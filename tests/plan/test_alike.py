"""Rows of a table: every module in exactly one, siblings together, sums exact."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sglang_mixed.patterns import NameTree, parse_pattern
from sglang_mixed.plan.alike import Group, alike

LASTS = ("down", "gate", "up")
keys = st.sampled_from("abc")


@given(st.dictionaries(st.tuples(st.integers(0, 3), st.integers(0, 3), st.sampled_from(LASTS)), keys))
def test_the_patterns_of_a_key_are_its_modules_and_the_sums_theirs(chosen: dict[tuple[int, int, str], str]) -> None:
    modules = {f"m.{layer}.e.{expert}.{last}": key for (layer, expert, last), key in chosen.items()}
    tree = NameTree([f"m.{a}.e.{b}.{last}" for a in range(4) for b in range(4) for last in LASTS], lambda _: ())
    sizes = {name: (len(name), number) for number, name in enumerate(modules)}
    seen = []
    for row in alike([Group(key, sizes[name], [name]) for name, key in modules.items()]):
        names = [name for pattern in row.names.split(", ") for name in tree.match(parse_pattern(pattern))]
        own = [name for name in names if name in modules]
        assert len(own) == row.number and {modules[name] for name in own} == {row.key}
        assert row.sizes == (sum(sizes[name][0] for name in own), sum(sizes[name][1] for name in own))
        seen += own
    assert sorted(seen) == sorted(modules)


def test_siblings_that_stand_in_the_same_places_share_a_row() -> None:
    names = [f"m.{layer}.{last}" for layer in range(3) for last in ("q", "k")] + ["m.1.o", "head"]
    rows = alike([Group("x", (1,), names)])
    assert [(row.names, row.number) for row in rows] == [("m.*.{k,q}", 6), ("m.1.o", 1), ("head", 1)]
