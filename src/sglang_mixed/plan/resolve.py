"""Which source each module comes from: the map's rules over the base model's names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint
from ..config import MixedPrecisionMap, Rule
from ..errors import PatternError, nearest
from ..patterns import NameTree, Pattern
from .complete import check_complete
from .families import never_loaded, other_mlp
from .fold import by_template, split_name

_WEIGHT = ("weight",)


@dataclass(frozen=True, slots=True)
class Assignment:
    """`rules`: module -> the rule that decided it, in the base's order; None where the default did.

    `foreign`: rules that name a dense MLP where the model has experts, or the reverse; they decide nothing.
    """

    default: str
    rules: dict[str, Rule | None]
    foreign: tuple[Rule, ...] = ()

    def source(self, module: str) -> str:
        """The source a module comes from."""
        rule = self.rules[module]
        return self.default if rule is None else rule.source

    def reason(self, module: str) -> str:
        """What decided, for messages."""
        rule = self.rules[module]
        return f"the default, {self.default}" if rule is None else f'line {rule.line} "{rule.pattern}": {rule.source}'

    @property
    def used(self) -> set[str]:
        """The sources that give at least one module."""
        return {self.default if rule is None else rule.source for rule in self.active}

    @property
    def active(self) -> list[Rule | None]:
        """The rules that decide anything, None for the default."""
        # Rules are few and compare slowly, modules are many.
        return list({id(rule): rule for rule in self.rules.values()}.values())


def default_source(described: MixedPrecisionMap, base: Path | None) -> str:
    """The map's default, else the source whose folder is the base model's, else the first."""
    return described.default or source_at(described, base) or next(iter(described.sources))


def source_at(described: MixedPrecisionMap, path: Path | None) -> str | None:
    """The source whose folder this is."""
    if path is None:
        return None
    resolved = path.resolve()
    return next((name for name, folder in described.sources.items() if folder.resolve() == resolved), None)


def assign(described: MixedPrecisionMap, default: str, base: Checkpoint) -> Assignment:
    """Resolve every rule: an exact name beats a pattern; among either, the later line wins.

    Raises PatternError for a rule that names no module of the base (other than one that would be there if the layer's
    MLP was of the other kind: maps for families of models name both), CoverageError for a base that lacks layers.
    """
    modules = base.modules
    skipped = never_loaded(modules, base.config)
    decided: dict[str, Rule | None] = dict.fromkeys(modules)
    for name in skipped:
        del decided[name]
    kinds, nameable = modules.kinds, [_nameable(tensors) for tensors in modules.tensors_of_kinds]
    tree = NameTree(decided, lambda name: nameable[kinds[name]])
    check_complete(tree, base)
    foreign = []
    parsed = list(zip(described.rules, described.patterns(), strict=True))
    for rule, pattern in sorted(parsed, key=lambda pair: pair[1].exact):
        matched = tree.match(pattern)
        if not matched and any(name in decided for name in other_mlp(rule.pattern.removesuffix(".weight"))):
            foreign.append(rule)
        elif not matched:
            raise _unmatched(described, rule, pattern, decided, skipped)
        decided.update(dict.fromkeys(matched, rule))
    return Assignment(default, decided, tuple(foreign))


def idle_rules(described: MixedPrecisionMap, assignment: Assignment) -> list[Rule]:
    """Rules that later or exact ones override everywhere."""
    active = {*assignment.active, *assignment.foreign}
    return [rule for rule in described.rules if rule not in active]


def _nameable(tensors: Collection[str]) -> tuple[str, ...]:
    """Local names by which a map may name the module: `weight`, or else what a module without one consists of."""
    if "weight" in tensors or "qweight" in tensors or "weight_packed" in tensors:
        return _WEIGHT
    return tuple(tensors)


def _unmatched(
    described: MixedPrecisionMap, rule: Rule, pattern: Pattern, modules: Mapping[str, Any], skipped: set[str]
) -> PatternError:
    templates = by_template(modules)
    beneath = [name for name in modules if name.startswith(rule.pattern.removesuffix(".weight") + ".")]
    if skipped and NameTree(skipped, lambda _: _WEIGHT).match(pattern):
        hint, remedy = "", "delete the line: it names only weights that the engine never loads"
    elif beneath:
        hint, remedy = "", f'"{rule.pattern}" is a prefix, not a weight: write "{rule.pattern}.**"'
    else:
        near = _nearest_name(rule.pattern, templates)
        hint, remedy = nearest(near, [near]) if near else "", "correct the name, or delete the line"
    return PatternError(
        f"the pattern {rule.pattern!r} matches no weight of the model{hint}",
        file=described.path,
        line=rule.line,
        rule="a pattern names weights or modules: * is one name part, ** any number, {0..15} and {a,b} alternatives",
        remedy=remedy,
    )


def _nearest_name(pattern: str, templates: Mapping[str, list[tuple[int, ...]]]) -> str | None:
    """The real name nearest to a pattern: by its template, with the pattern's own numbers where they exist."""
    wanted, indices = split_name(re.sub(r"\{[^{}]*\}", "*", pattern).removesuffix(".weight"))
    close = difflib.get_close_matches(wanted, list(templates), n=1, cutoff=0.4)
    if not close:
        return None
    if "*" not in pattern and "{" not in pattern:
        real = indices if indices in templates[close[0]] else templates[close[0]][0]
        pieces = close[0].split("*")
        numbers = [*map(str, real), ""]
        return "".join(piece + number for piece, number in zip(pieces, numbers, strict=True)) + ".weight"
    return close[0] + ".weight"
