"""Patterns: what each sign matches, what is malformed, and that nothing takes more than linear time."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sglang_mixed.errors import PatternError
from sglang_mixed.patterns import NameTree, parse_pattern

MODULES = {
    "model.embed_tokens": ("weight",),
    "model.layers.1.self_attn": ("sinks",),
    **{
        f"model.layers.{layer}.{name}": ("weight",)
        for layer in range(12)
        for name in (
            "self_attn.q_proj",
            "self_attn.o_proj",
            "mlp.gate",
            "mlp.experts.0.up_proj",
            "mlp.experts.3.up_proj",
        )
    },
    "model.norm": ("weight",),
    "lm_head": ("weight",),
}
TREE = NameTree(MODULES, MODULES.__getitem__)


def match(pattern: str) -> set[str]:
    return set(TREE.match(parse_pattern(pattern)))


def layers(numbers: range | list[int], *names: str) -> set[str]:
    return {f"model.layers.{number}.{name}" for number in numbers for name in names}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("lm_head", {"lm_head"}),
        ("lm_head.weight", {"lm_head"}),
        ("lm_head.*", {"lm_head"}),
        ("model.norm.bias", set()),
        ("model.layers.3.mlp", set()),
        ("model.layers.*.mlp.gate", layers(range(12), "mlp.gate")),
        ("model.layers.1*.mlp.gate.weight", layers([1, 10, 11], "mlp.gate")),
        ("model.layers.*.self_attn.*_proj.weight", layers(range(12), "self_attn.q_proj", "self_attn.o_proj")),
        ("model.*", {"model.embed_tokens", "model.norm"}),
        ("*", {"lm_head"}),
        ("**", set(MODULES)),
        ("**.weight", set(MODULES) - {"model.layers.1.self_attn"}),
        ("model.**.gate", layers(range(12), "mlp.gate")),
        ("model.layers.{0..2}.mlp.gate", layers(range(3), "mlp.gate")),
        ("model.layers.{0..1,7,10..11}.mlp.gate", layers([0, 1, 7, 10, 11], "mlp.gate")),
        ("model.layers.2.self_attn.{q,o}_proj.weight", layers([2], "self_attn.q_proj", "self_attn.o_proj")),
        ("model.layers.2.{self_attn.q_proj,mlp.gate}", layers([2], "self_attn.q_proj", "mlp.gate")),
        ("model.layers.2.{mlp.**,self_attn.*}", layers([2], *(n for n in (
            "self_attn.q_proj", "self_attn.o_proj", "mlp.gate", "mlp.experts.0.up_proj", "mlp.experts.3.up_proj")))),
        ("model.layers.1.self_attn.sinks", {"model.layers.1.self_attn"}),
        ("model.norm.**", {"model.norm"}),
        ("**.norm.**.weight", {"model.norm"}),
        ("model.layers.*.mlp.experts.{1..3}.up_proj", layers(range(12), "mlp.experts.3.up_proj")),
        ("MODEL.norm", set()),
        ("model?norm", set()),
    ],
)  # fmt: skip
def test_what_a_pattern_matches(pattern: str, expected: set[str]) -> None:
    assert match(pattern) == expected


@pytest.mark.parametrize(
    ("pattern", "rule"),
    [
        ("", "empty"),
        ("model..norm", "empty"),
        ("model.{norm", "pairs"),
        ("model.norm}", "pairs"),
        ("model.{a{b}}", "nest"),
        ("model.{}.x", "range such as"),
        ("model.{a,}.x", "range such as"),
        ("layers.{7..3}", "counts upward"),
        ("layers.{0..999999999}", "counts upward"),
        ("layers.{0..60000}{0..60000}", "at most"),
        ("layers.*{0..300}", "256"),
        ("{a.b,c.d}{a.b,c.d}{a.b,c.d}{a.b,c.d}{a.b,c.d}{a.b,c.d}{a.b,c.d}{a.b,c.d}{a.b,c.d}{a.b,c.d}{a.b,c.d}", "dots"),
        ("model.a**", "stands alone"),
        ("x" * 1001, "at most 1000"),
    ],
)
def test_a_malformed_pattern_names_its_rule(pattern: str, rule: str) -> None:
    with pytest.raises(PatternError) as caught:
        parse_pattern(pattern)
    assert rule in str(caught.value.rule)


@pytest.mark.parametrize("text", ["model.norm", "lm_head.weight"])
def test_only_a_plain_name_is_exact(text: str) -> None:
    assert parse_pattern(text).exact
    assert not parse_pattern(text + ".*").exact
    assert not parse_pattern(text.replace("m", "{m,n}", 1)).exact


@pytest.mark.parametrize("pattern", ["**." * 300 + "x", "*a" * 300 + ".x", "{0..60000}." * 80 + "x"])
def test_hostile_patterns_take_linear_time(pattern: str) -> None:
    tree = NameTree(("a" * 400 + f".b{index}." + "a." * 50 + "y" for index in range(100)), lambda _: ("weight",))
    started = time.perf_counter()
    assert tree.match(parse_pattern(pattern)) == []
    assert time.perf_counter() - started < 5


words = st.text("ab1", min_size=1, max_size=4)


@example(["1"], ["1", "*", "**"])
@given(
    st.lists(words, min_size=1, max_size=4),
    st.lists(words | st.sampled_from(["*", "**", "a*", "*1", "*a*"]), min_size=1, max_size=4),
)
def test_agrees_with_a_regular_expression(name: list[str], pattern: list[str]) -> None:
    regex = ""
    for part in pattern:
        regex += r"(?:\.[^.]+)*" if part == "**" else r"\." + "[^.]*".join(map(re.escape, part.split("*")))
    module = ".".join(name)
    expected = any(re.fullmatch(regex, f".{text}") for text in (module, f"{module}.weight"))
    assert bool(NameTree([module], lambda _: ("weight",)).match(parse_pattern(".".join(pattern)))) == expected
