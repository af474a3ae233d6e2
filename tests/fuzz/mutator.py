"""Structure-aware mutation: parse JSON, change one or more fields, serialize again; keys may then stand twice."""

from __future__ import annotations

import json
import random
from typing import Any


class Object(list[tuple[str, Any]]):
    """A JSON object as its pairs, so that a mutant can hold a key twice."""


NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 7, 65_536, 1 << 31, 1 << 62, 1 << 63, 1 << 70, -(1 << 63), 0.5, -0.0, 1e308),
    *(
        float("nan"),
        float("inf"),
        "",
        ".",
        "..",
        "../x.safetensors",
        "/etc/passwd",
        "model.bin",
        "a\0b",
        "\ud800",
        "no",
    ),
    *("x" * 300, "x" * 5000, "F32", "F8_E4M3", "BF16", "I32", "U8", "F4", "gptq", "awq", "fp8", "compressed-tensors"),
    *("auto-round", "modelopt", "mxfp4", "(a+)+$", "re:(", "*", "**", "{0..9}", "{0..999999999}", "größe"),
    *([], Object(), [0], [1, 2, 3], [-1], [[]], Object([("a", Object())]), Object([("", None)])),
)
_DEEP: list[Any] = []
for _ in range(2000):
    _DEEP = [_DEEP]


def parse(raw: bytes | str) -> Any:
    """JSON with objects as `Object`."""
    return json.loads(raw, object_pairs_hook=Object)


def dump(value: Any, *, compact: bool = True) -> str:
    """JSON text of what `parse` gave, whatever a mutation made of it."""
    comma, colon = (",", ":") if compact else (", ", ": ")
    parts: list[str] = []
    # By hand and not recursive: json.dumps cannot write a key twice, nor what is nested 2,000 deep.
    stack: list[Any] = [_Value(value)]
    while stack:
        item = stack.pop()
        if not isinstance(item, _Value):
            parts.append(item)
        elif isinstance(item.value, Object):
            pieces: list[Any] = ["{"]
            for number, (key, one) in enumerate(item.value):
                pieces += [comma if number else "", json.dumps(key, ensure_ascii=False) + colon, _Value(one)]
            stack += reversed([*pieces, "}"])
        elif isinstance(item.value, list):
            pieces = ["["]
            for number, one in enumerate(item.value):
                pieces += [comma if number else "", _Value(one)]
            stack += reversed([*pieces, "]"])
        else:
            parts.append(json.dumps(item.value, ensure_ascii="\ud800" in str(item.value)))
    return "".join(parts)


class _Value:
    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class Mutator:
    """Mutations by a seeded generator."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def mutate(self, root: Any) -> Any:
        """A changed copy: one change mostly, up to four."""
        root = copy(root)
        for _ in range(self.random.choice((1, 1, 1, 2, 4))):
            self._change(root)
        return root

    def flip(self, raw: bytes, end: int | None = None) -> bytes:
        """One to four bytes before `end` changed, deleted, inserted or repeated."""
        changed = bytearray(raw)
        for _ in range(self.random.choice((1, 1, 2, 4))):
            place = self.random.randrange(min(end or len(changed), len(changed)))
            kind = self.random.randrange(6)
            if kind < 3:
                changed[place] = self.random.randrange(256)
            elif kind == 3:
                del changed[place : place + self.random.choice((1, 2, 30))]
            elif kind == 4:
                changed[place:place] = self.random.choice(
                    (b"{", b"}", b"[", b'"', b",", b"\\", b"\0", b"0", b"-", b"\xff")
                )
            else:
                changed[place:place] = changed[place : place + self.random.choice((1, 8, 40))]
            if not changed:
                break
        return bytes(changed)

    def _change(self, root: Any) -> None:
        parents = [node for node in _walk(root) if node]
        if not parents:
            return
        # Mostly a leaf's parent: those are many, and the outer ones few.
        parent = self.random.choice(parents)
        index = self.random.randrange(len(parent))
        if isinstance(parent, Object):
            self._change_pair(parent, index)
        else:
            self._change_item(parent, index)

    def _change_pair(self, parent: Object, index: int) -> None:
        key, value = parent[index]
        other, other_value = parent[self.random.randrange(len(parent))]
        kind = self.random.randrange(10)
        if kind < 4:
            parent[index] = key, self._other(value)
        elif kind == 4:
            del parent[index]
        elif kind == 5:
            parent.insert(self.random.randrange(len(parent) + 1), (key, self.random.choice((value, other_value))))
        elif kind == 6:
            parent[index] = key, copy(other_value)
        elif kind == 7:
            parent[index] = other, value
        elif kind == 8:
            parent[index] = self._other_text(key), value
        else:
            self.random.shuffle(parent)

    def _change_item(self, parent: list[Any], index: int) -> None:
        kind = self.random.randrange(6)
        if kind < 4:
            parent[index] = self._other(parent[index])
        elif kind == 4:
            del parent[index]
        else:
            parent.insert(index, parent[index])

    def _other(self, value: Any) -> Any:
        if self.random.random() < 0.4:
            if self.random.random() < 0.02:
                return _DEEP
            return copy(self.random.choice(NASTY))
        if isinstance(value, bool) or value is None:
            return not value
        if isinstance(value, int):
            change = self.random.choice((1, -1, value, -2 * value, 64, -(value // 2), 1 << 32))
            return value + change
        if isinstance(value, float):
            return value * self.random.choice((-1, 2, 0))
        if isinstance(value, str):
            return self._other_text(value)
        return [value] if self.random.random() < 0.5 else Object([("x", value)])

    def _other_text(self, text: str) -> str:
        place = self.random.randrange(len(text) + 1)
        kind = self.random.randrange(5)
        if kind == 0:
            return text[:place] + text[place + 1 :]
        if kind == 1:
            return text[:place] + self.random.choice(".*{}/\\\0\"'é9") + text[place:]
        if kind == 2:
            return text.replace("0", "1") if "0" in text else text.upper()
        if kind == 3:
            return text[:place]
        return text + self.random.choice(("_", ".weight", "0", " "))


def copy(value: Any) -> Any:
    """A deep copy (of lists and objects; `_DEEP` is shared, and never changed in place)."""
    if value is _DEEP:
        return value
    if isinstance(value, Object):
        return Object((key, copy(one)) for key, one in value)
    return [copy(one) for one in value] if isinstance(value, list) else value


def _walk(root: Any) -> list[Any]:
    """Every list and object."""
    found, stack = [], [root]
    while stack:
        node = stack.pop()
        if isinstance(node, list) and node is not _DEEP:
            found.append(node)
            stack += [one for _, one in node] if isinstance(node, Object) else node
    return found
