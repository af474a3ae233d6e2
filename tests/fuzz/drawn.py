"""What the properties are tried on, how often, and what a pattern matches."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from sglang_mixed.patterns import NameTree, parse_pattern

PROPERTY = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
WORD = st.text("abc01_", min_size=1, max_size=3)
NAME = st.lists(WORD, min_size=1, max_size=4).map(".".join)


def matched(pattern: str, names: list[str]) -> set[str]:
    return set(NameTree(names, lambda _: ("weight",)).match(parse_pattern(pattern)))
