"""What travels through a slab at once: whole small tensors, or a piece of one that is larger."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple, TypeVar

from ...checkpoint import Piece, Read, opened, pieces, read_packed
from ...stream import FileRead
from .slabs import Slab, aligned, lay_out

T = TypeVar("T")


class Batch(NamedTuple):
    """What one slab is filled with, and where; `codes` bytes at its beginning are e4m3 codes."""

    pieces: list[Piece]
    places: list[int]
    codes: int

    @property
    def nbytes(self) -> int:
        """Of all, and of what is between them."""
        return max(place + piece.nbytes for piece, place in zip(self.pieces, self.places, strict=True))

    def fill(self, slab: Slab, descriptor: int, path: Path) -> None:
        """Read all, once nothing uses the slab."""
        slab.wait()
        read_packed(descriptor, path, self.pieces, slab.memory, self.places)


def batches(
    reads: Sequence[FileRead], files: ExitStack, limit: int, is_only_codes: Callable[[Read], bool]
) -> Iterator[tuple[int, Path, Batch]]:
    """(open file, its path, what fits into a slab of `limit` bytes), in file order."""
    for _, path, of in reads:
        descriptor = files.enter_context(opened(path))
        for batch in together(
            itertools.chain.from_iterable(pieces(read, limit) for read in of), limit, attrgetter("nbytes")
        ):
            yield descriptor, path, _batch(batch, is_only_codes)


def _batch(of: list[Piece], is_only_codes: Callable[[Read], bool]) -> Batch:
    """Codes first, so that the GPU can look at all of them at once."""
    codes = [is_only_codes(piece.read) for piece in of]
    order = sorted(range(len(of)), key=lambda number: not codes[number])
    begins = lay_out([of[number].nbytes for number in order])
    places = [0] * len(of)
    for number, begin in zip(order, begins, strict=True):
        places[number] = begin
    return Batch(of, places, max((places[n] + of[n].nbytes for n in order if codes[n]), default=0))


def together(items: Iterable[T], limit: int, size_of: Callable[[T], int]) -> Iterator[list[T]]:
    """As many at a time as a slab of `limit` bytes holds, and what is larger alone."""
    batch, left = list[T](), limit
    for item in items:
        size = size_of(item)
        if batch and size > left:
            yield batch
            batch, left = [], limit
        batch.append(item)
        left -= aligned(size)
    if batch:
        yield batch
