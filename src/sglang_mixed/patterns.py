"""Patterns over dotted weight names, matched part by part in time linear in the names.

`*` is one name part or a piece of one, `**` any number of parts, `{0..15}` and `{a,b}` are alternatives.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

from .errors import PatternError

T = TypeVar("T")

MAX_LENGTH = 1000
#: Most alternatives that the braces of one pattern may stand for, per name part.
MAX_ALTERNATIVES = 65_536
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,9})\.\.(\d{1,9})")


@dataclass(frozen=True, slots=True)
class Part:
    """One name part of a pattern: exact `words`, and `globs` (texts with `*`) that may stand in their place."""

    words: frozenset[str]
    globs: tuple[str, ...] = ()

    def matches(self, word: str) -> bool:
        """Whether the part stands for this name part."""
        return word in self.words or any(_glob(glob, word) for glob in self.globs)


#: `**`: any number of name parts, none included.
ANY_PARTS = Part(frozenset(), ("**",))


@dataclass(frozen=True, slots=True)
class Pattern:
    """A parsed pattern: `paths` are its alternatives, each a tuple of parts. `exact` if it is one plain name."""

    text: str
    paths: tuple[tuple[Part, ...], ...]

    @property
    def exact(self) -> bool:
        """No wildcard, range or alternative: the text is a name."""
        return not any(mark in self.text for mark in "*{")


def parse_pattern(text: str) -> Pattern:
    """The pattern a text means; raises PatternError (without a line, which only the map knows) for a malformed one."""
    if len(text) > MAX_LENGTH:
        raise PatternError(f"a pattern of {len(text)} characters", rule=f"at most {MAX_LENGTH} characters")
    unbraced = _BRACES.sub("", text)
    if "{" in unbraced or "}" in unbraced:
        raise _malformed(text, "braces come in pairs and do not nest")
    paths, known = [], dict[str, Part]()
    for path in _split_dotted(text):
        parts = re.split(r"\.(?![^{]*\})", path)
        if not all(parts):
            raise _malformed(text, "a name part may not be empty")
        for part in parts:
            if part not in known:
                known[part] = _parse_part(part, text)
        if sum(len(part.words) for part in known.values()) > 2 * MAX_ALTERNATIVES:
            raise _malformed(text, f"the braces of all parts stand for at most {2 * MAX_ALTERNATIVES} names")
        parsed = [known[part] for part in parts]
        # `**.**` means what `**` means; collapsed, no walk repeats another.
        paths.append(
            tuple(
                part for part, before in zip(parsed, [None, *parsed], strict=False) if not (part is before is ANY_PARTS)
            )
        )
    return Pattern(text, tuple(paths))


def _malformed(text: str, rule: str) -> PatternError:
    return PatternError(f"malformed pattern {text!r}", rule=rule)


def _split_dotted(text: str) -> list[str]:
    """Expand alternatives that themselves hold dots (`{mlp.gate,self_attn.q_proj}`): they cannot stay in one part."""
    pieces = _BRACES.split(text)
    choices = [
        [piece] if not inside else piece.split(",") if _crosses_parts(piece) else ["{" + piece + "}"]
        for inside, piece in ((index % 2, piece) for index, piece in enumerate(pieces))
    ]
    if _product(choices) > MAX_ALTERNATIVES // 64:
        raise _malformed(text, f"alternatives with dots stand for at most {MAX_ALTERNATIVES // 64} names")
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _crosses_parts(braces: str) -> bool:
    return any("." in word and not _RANGE.fullmatch(word) for word in braces.split(","))


def _product(choices: Iterable[list[str]]) -> int:
    product = 1
    for words in choices:
        product *= len(words)
    return product


def _parse_part(part: str, text: str) -> Part:
    if part == "**":
        return ANY_PARTS
    if "**" in part:
        raise _malformed(text, "'**' stands alone between dots")
    pieces = _BRACES.split(part)
    choices = [_alternatives(piece, text) if index % 2 else [piece] for index, piece in enumerate(pieces)]
    if _product(choices) > MAX_ALTERNATIVES:
        raise _malformed(text, f"the braces of one name part stand for at most {MAX_ALTERNATIVES} names")
    words = ["".join(chosen) for chosen in itertools.product(*choices)]
    globs = tuple(word for word in words if "*" in word)
    if len(globs) > 256:
        raise _malformed(text, "at most 256 alternatives may stand beside a '*' in one name part")
    return Part(frozenset(words).difference(globs), globs)


def _alternatives(braces: str, text: str) -> list[str]:
    """The words a pair of braces stands for: comma-separated words and ranges `{0..3,7}`."""
    words: list[str] = []
    for word in braces.split(","):
        bounds = _RANGE.fullmatch(word)
        if bounds:
            first, last = int(bounds[1]), int(bounds[2])
            if not first <= last < first + MAX_ALTERNATIVES:
                raise _malformed(text, f"a range counts upward over at most {MAX_ALTERNATIVES} numbers")
            words.extend(map(str, range(first, last + 1)))
        elif not word:
            raise _malformed(text, "braces hold comma-separated words or a range such as {0..15}")
        else:
            words.append(word)
    return words


@lru_cache(maxsize=65_536)
def _glob(glob: str, word: str) -> bool:
    """Whether `word` has the texts between the `*`s in order: greedy, each text at its first place."""
    if glob == "*":
        return True
    first, *middle, last = glob.split("*")
    if len(word) < len(first) + len(last) or not word.startswith(first) or not word.endswith(last):
        return False
    start, end = len(first), len(word) - len(last)
    for text in middle:
        found = word.find(text, start, end)
        if found < 0:
            return False
        start = found + len(text)
    return True


class _Node:
    """One dotted prefix: the modules that end right below it, and the longer prefixes."""

    __slots__ = ("children", "modules")

    def __init__(self) -> None:
        self.children: dict[str, _Node] = {}
        self.modules: dict[str, str] = {}


class NameTree:
    """Module names by their parts, built once; each pattern then walks only what it matches."""

    def __init__(self, modules: Iterable[str], locals_of: Callable[[str], tuple[str, ...]]) -> None:
        """`locals_of` tells the local names under which a module may be named too (usually `weight`)."""
        self._locals_of = locals_of
        self._root = _Node()
        self._nodes = {"": self._root}
        before, node = "", self._root
        for module in modules:
            parent, _, name = module.rpartition(".")
            if parent != before:  # neighbours mostly share theirs
                before, node = parent, self._nodes.get(parent) or self._add(parent)
            node.modules[name] = module

    def _add(self, prefix: str) -> _Node:
        """The node of a prefix, with those above it; a name may have more parts than Python may nest calls."""
        added = node = self._nodes[prefix] = _Node()
        while prefix:
            prefix, _, name = prefix.rpartition(".")
            known = self._nodes.get(prefix)
            above = known or self._nodes.setdefault(prefix, _Node())
            above.children[name] = node
            if known:
                break
            node = above
        return added

    @property
    def longest(self) -> str:
        """The longest dotted prefix."""
        return max(self._nodes, key=len)

    def below(self, prefix: str) -> Collection[str]:
        """The name parts that lead on from a dotted prefix; none where no module is below it."""
        return self._nodes[prefix].children.keys() if prefix in self._nodes else ()

    def match(self, pattern: Pattern) -> list[str]:
        """The modules whose own name, or whose name with one of its local names, the pattern matches."""
        found: list[str] = []
        for path in pattern.paths:
            found += self._ending_at(path)
            found += self._named_by_weight(path)
            if len(shorter := _without_trailing_any(path)) < len(path):
                found += self._named_by_weight(shorter)
        return list(dict.fromkeys(found))

    def _named_by_weight(self, path: tuple[Part, ...]) -> list[str]:
        """Modules whose name is matched by all but the last part of `path`, and a local name by that."""
        if not path:
            return []
        verdicts: dict[tuple[str, ...], bool] = {}
        found = []
        for module in self._ending_at(path[:-1]):
            names = self._locals_of(module)
            verdict = verdicts.get(names)
            if verdict is None:
                verdict = verdicts[names] = any(map(path[-1].matches, names))
            if verdict:
                found.append(module)
        return found

    def _ending_at(self, path: tuple[Part, ...]) -> list[str]:
        """Modules whose name without a local name is matched by `path`."""
        if not path:
            return []
        nodes, last = [self._root], path[-1]
        for part in path[:-1]:
            nodes = _step(nodes, part)
        if last is ANY_PARTS:
            below = [module for node in _step(nodes, last) for module in node.modules.values()]
            return below + self._ending_at(path[:-1])
        return _select(last, (node.modules for node in nodes))


def _without_trailing_any(path: tuple[Part, ...]) -> tuple[Part, ...]:
    """The path where each `**` at its end stands for no part."""
    while path and path[-1] is ANY_PARTS:
        path = path[:-1]
    return path


def _step(nodes: list[_Node], part: Part) -> list[_Node]:
    """The nodes that one pattern part leads to from `nodes`."""
    if part is not ANY_PARTS:
        return _select(part, (node.children for node in nodes))
    seen: dict[int, _Node] = {}
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if id(node) not in seen:
            seen[id(node)] = node
            stack.extend(node.children.values())
    return list(seen.values())


def _select(part: Part, tables: Iterable[Mapping[str, T]]) -> list[T]:
    """The values whose key `part` matches. Distinct keys are few (numbers and words): each is judged once."""
    if not part.globs and len(part.words) == 1:
        (word,) = part.words
        return [table[word] for table in tables if word in table]
    if "*" in part.globs:
        return [value for table in tables for value in table.values()]
    verdicts: dict[str, bool] = {}
    found = []
    for table in tables:
        for key, value in table.items():
            verdict = verdicts.get(key)
            if verdict is None:
                verdict = verdicts[key] = part.matches(key)
            if verdict:
                found.append(value)
    return found
