"""One safetensors file's tensors, and where they lie."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from ..formats.base import ITEM_BYTES, TensorInfo


class View(NamedTuple):
    """A tensor inside a stored matrix of this shape: its transpose if `transposed`, then rows first, first + step, ...

    `text` says the same of the file's tensor, for reports: `model.layers.0.mlp.experts.gate_up_proj[3, :, 0::2].T`.
    """

    text: str
    shape: tuple[int, ...]
    transposed: bool
    first: int
    step: int

    @property
    def is_run(self) -> bool:
        """Whether the tensor's bytes lie one after another."""
        return not self.transposed and self.step == 1


class Entry(NamedTuple):
    """Where one tensor lies: index of its file, dtype code, shape, and absolute byte positions [begin, end).

    With a `view` these are the positions of the stored matrix that the tensor is a part of.
    """

    file: int
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    view: View | None = None


class Part(NamedTuple):
    """One tensor of a module, whichever module that is: local name, dtype and shape, bytes."""

    local: str
    info: TensorInfo
    nbytes: int

    @classmethod
    def of(cls, local: str, info: TensorInfo) -> Part:
        """The part of this name."""
        return cls(local, info, math.prod(info.shape) * ITEM_BYTES[info.dtype])


#: Tensors of one module that lie one after another. One object where alike: its identity may stand for it.
Parts = tuple[Part, ...]
#: A tensor of a shard: the number of its run, and its own within that.
Place = tuple[int, int]


class Stamp(NamedTuple):
    """By what a change of a file is noticed: bytes, time of the last write (ns), CRC-32 of the header."""

    size: int
    modified: int
    header: int


@dataclass(frozen=True)
class Shard:
    """One file's tensors in the order of their bytes, in runs of one module each: module, parts, begin in the data."""

    path: Path
    modules: list[str]
    parts: list[Parts]
    begins: list[int]
    data_begin: int
    stamp: Stamp

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @cached_property
    def names(self) -> list[str]:
        """Full tensor names."""
        return [join(module, part[0]) for module, parts in zip(self.modules, self.parts, strict=True) for part in parts]

    @property
    def places(self) -> Iterator[Place]:
        """The place of each tensor, as `names` has them."""
        return ((run, number) for run, parts in enumerate(self.parts) for number in range(len(parts)))

    def name(self, place: Place) -> str:
        """The full name of the tensor there."""
        return join(self.modules[place[0]], self.parts[place[0]][place[1]].local)

    def find(self, module: str, local: str, start: int = 0) -> Place | None:
        """The place of one tensor, by search from the run `start` on, then before it."""
        run = start - 1
        try:
            while True:
                run = self.modules.index(module, run + 1)
                for number, part in enumerate(self.parts[run]):
                    if part.local == local:
                        return run, number
        except ValueError:
            return self.find(module, local) if start else None

    def entry(self, file: int, place: Place) -> Entry:
        """The entry of the tensor there; `file` is the shard's own index."""
        run, number = place
        parts = self.parts[run]
        begin = self.data_begin + self.begins[run] + sum(part.nbytes for part in parts[:number])
        return Entry(file, *parts[number].info, begin, begin + parts[number].nbytes)


def join(module: str, local: str) -> str:
    """The tensor name of a module's local name."""
    return f"{module}.{local}" if module else local
