"""What repeats in headers: the same tensors follow one another in module after module."""

from __future__ import annotations

import re

from ..formats.base import ITEM_BYTES, TensorInfo
from .examine import MAX_DIMENSIONS
from .shard import Part, Parts

_SIZES = r"(?:(?:0|[1-9][0-9]*)(?:,(?:0|[1-9][0-9]*))*)?"
#: What the library writes between a module's name and its tensor's offsets: local name, dtype and shape.
_TAIL = re.compile(rf'([^".]+)":\{{"dtype":"([A-Z0-9_]+)","shape":\[({_SIZES})\],"data_offsets":')


class Step:
    """A tensor of a run, after those before it; without a tensor, the begin of every run.

    `tail` is its entry's text from the local name to the offsets, which all modules share that have such a run.
    `expected` is the step that came next when a run was last here, None where the run ended.
    """

    __slots__ = ("_before", "_part", "_parts", "expected", "known", "nbytes", "tail")

    def __init__(self, before: Step | None = None, tail: str = "", part: Part | None = None) -> None:
        self._before, self.tail, self._part = before, tail, part
        self.nbytes = part.nbytes if part else 0
        self.expected: Step | None = None
        #: Tail -> the step that it leads to.
        self.known: dict[str, Step] = {}
        self._parts: Parts | None = None

    def after(self, tail: str) -> Step:
        """The step that a tail leads to. Raises ValueError for a text that is none."""
        found = self.known.get(tail)
        if found is None:
            found = self.known[tail] = Step(self, tail, _parse(tail))
        return found

    @property
    def parts(self) -> Parts:
        """All of a run that ends here, one object however often it is asked for."""
        if self._parts is None:
            found, step = [], self
            while step._part and step._before:
                found.append(step._part)
                step = step._before
            self._parts = tuple(reversed(found))
        return self._parts


def _parse(tail: str) -> Part:
    found = _TAIL.fullmatch(tail)
    if not found or found[2] not in ITEM_BYTES or found[1] == "__metadata__" or found[3].count(",") >= MAX_DIMENSIONS:
        raise ValueError
    return Part.of(found[1], TensorInfo(found[2], tuple(int(size) for size in found[3].split(",") if size)))
