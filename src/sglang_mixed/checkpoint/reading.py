"""Positioned reads of tensors. Never a memory map: a file truncated under a map kills the process."""

from __future__ import annotations

import ctypes
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ..errors import TruncatedFileError
from ..formats.base import ITEM_BYTES, TORCH_DTYPES
from ..pages import populate
from .opening import unreadable
from .shard import Entry

MAX_BUFFERS = os.sysconf("SC_IOV_MAX")
#: Of each dimension of a tensor, [begin, end).
Ranges = tuple[tuple[int, int], ...]


class Read(NamedTuple):
    """A tensor to read: its full name, its place, and of each dimension the range that is wanted (None: all).

    A tensor that is a view of a stored matrix is read as the region of that matrix in which it lies.
    """

    name: str
    entry: Entry
    ranges: Ranges | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what is read."""
        return tuple(end - begin for begin, end in self.ranges) if self.ranges else self.entry.shape

    @property
    def nbytes(self) -> int:
        """Bytes of what is wanted."""
        if self.ranges is None and self.entry.view is None:
            return self.entry.end - self.entry.begin
        return math.prod(self.shape) * ITEM_BYTES[self.entry.dtype]

    @property
    def stored(self) -> Read:
        """What of the stored matrix is read for it: all rows between those it takes in turns with others'."""
        view = self.entry.view
        if view is None:
            return self
        (begin, end), *columns = self.ranges or [(0, size) for size in self.entry.shape]
        first = view.first - view.first % view.step
        rows = first + begin * view.step, first + end * view.step
        ranges = (*columns, rows) if view.transposed else (rows, *columns)
        return Read(self.name, self.entry._replace(shape=view.shape, view=None), ranges)

    def shares(self, other: Read) -> bool:
        """Whether one reading serves both."""
        view = self.entry.view
        return view is not None and view.step > 1 and self.stored[1:] == other.stored[1:]


def read_entry(descriptor: int, path: Path, read: Read, destination: torch.Tensor | None = None) -> torch.Tensor:
    """One tensor or the wanted part of it, in memory of its own or in a `destination` of that shape.

    Only the wanted bytes are read, and those between them. A destination may be columns of a larger matrix.
    Raises TruncatedFileError where the file has shrunk since its header was read.
    """
    ((_, tensor, _),) = read_entries(descriptor, path, [read], lambda _: destination)
    return tensor


def read_entries(
    descriptor: int, path: Path, reads: Sequence[Read], destination: Callable[[Read], torch.Tensor | None]
) -> Iterator[tuple[str, torch.Tensor, int]]:
    """(name, tensor, bytes read for it) of each, as `read_entry`; what neighbours share is read for the first."""
    matrix: torch.Tensor | None = None
    for before, read in zip((None, *reads), reads, strict=False):
        view, place = read.entry.view, destination(read)
        if view is None or view.is_run:
            matrix = None
            yield read.name, _read_matrix(descriptor, path, read.stored, place), read.nbytes
            continue
        fresh = 0
        if matrix is None or before is None or not read.shares(before):
            matrix, fresh = _read_matrix(descriptor, path, read.stored), read.stored.nbytes
        own = slice(view.first % view.step, None, view.step)
        # torch transposes a whole contiguous matrix ten times as fast as any other.
        wanted = matrix[:, own].contiguous().T if view.transposed else matrix[own]
        yield read.name, wanted.contiguous() if place is None else place.copy_(wanted), fresh


def _read_matrix(descriptor: int, path: Path, read: Read, destination: torch.Tensor | None = None) -> torch.Tensor:
    dtype = TORCH_DTYPES[read.entry.dtype]
    if destination is None:
        destination = populate(torch.empty(read.shape, dtype=dtype))
    assert (destination.dtype, destination.shape) == (dtype, read.shape)
    for position, piece in _pieces(read.entry, read.ranges, destination):
        read_into(descriptor, path, read.name, position, _buffers(piece))
    return destination


class Piece(NamedTuple):
    """Bytes of a tensor that is no view: all that are wanted of it, or as many as are read at once.

    `begin` counts the wanted bytes before; `runs` are (position in the file, bytes).
    """

    read: Read
    begin: int
    nbytes: int
    runs: Sequence[tuple[int, int]]

    @property
    def end(self) -> int:
        """The wanted bytes before and in it."""
        return self.begin + self.nbytes


def pieces(read: Read, limit: int) -> Iterator[Piece]:
    """What is wanted of a tensor, at most `limit` bytes at a time; one piece if it is empty."""
    begin = nbytes = 0
    runs: list[tuple[int, int]] = []
    for position, left in _runs(read.entry, read.ranges):
        while left:
            if nbytes == limit:
                yield Piece(read, begin, nbytes, runs)
                begin, nbytes, runs = begin + nbytes, 0, []
            count = min(left, limit - nbytes)
            runs.append((position, count))
            position, left, nbytes = position + count, left - count, nbytes + count
    yield Piece(read, begin, nbytes, runs)


def read_packed(
    descriptor: int, path: Path, wanted: Sequence[Piece], memory: memoryview, places: Sequence[int]
) -> None:
    """Read pieces of tensors to their places in one piece of memory; neighbours by one call.

    Raises TruncatedFileError where the file has shrunk since its header was read.
    """
    runs: list[tuple[Read, int, memoryview]] = []
    end = -1
    for piece, place in zip(wanted, places, strict=True):
        for position, nbytes in piece.runs:
            if position != end:
                _read_runs(descriptor, path, runs)
                runs = []
            runs.append((piece.read, position, memory[place : place + nbytes]))
            place, end = place + nbytes, position + nbytes
    _read_runs(descriptor, path, runs)


def _read_runs(descriptor: int, path: Path, runs: Sequence[tuple[Read, int, memoryview]]) -> None:
    """Bytes of the file that follow each other."""
    if not runs:
        return
    (first, position, _), buffers = runs[0], [buffer for _, _, buffer in runs]
    try:
        read_into(descriptor, path, first.name, position, buffers)
    except TruncatedFileError:
        for read, position, buffer in runs:  # which of them is it that the file ends in?
            read_into(descriptor, path, read.name, position, [buffer])
        raise


def _pieces(entry: Entry, ranges: Ranges | None, destination: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """(position in the file, contiguous part of the destination) of each run of bytes."""
    if destination.numel() == 0:
        return
    depth = _depth(entry, ranges)
    # Few operators of torch's: each gives Python's lock to another thread.
    pieces = [destination] if depth <= 0 else destination.view(-1, *destination.shape[depth:])
    for (position, _), piece in zip(_runs(entry, ranges), pieces, strict=True):
        yield position, piece


def _runs(entry: Entry, ranges: Ranges | None) -> Iterator[tuple[int, int]]:
    """(position in the file, bytes) of each run of bytes, in the order of what is wanted."""
    depth = _depth(entry, ranges)
    if depth < 0:
        yield entry.begin, entry.end - entry.begin
        return
    assert ranges is not None
    strides = [math.prod(entry.shape[dim + 1 :]) * ITEM_BYTES[entry.dtype] for dim in range(depth + 1)]
    begin, end = ranges[depth]
    for place in itertools.product(*(range(*bounds) for bounds in ranges[:depth])):
        position = entry.begin + sum(index * stride for index, stride in zip((*place, begin), strides, strict=True))
        yield position, (end - begin) * strides[depth]


def _depth(entry: Entry, ranges: Ranges | None) -> int:
    """The last dimension of which not all is wanted; -1 if all is."""
    return max((dim for dim, bounds in enumerate(ranges or ()) if bounds != (0, entry.shape[dim])), default=-1)


def _buffers(piece: torch.Tensor) -> list[memoryview]:
    """A tensor's memory: one buffer, or one a row where rows do not touch."""
    if piece.is_contiguous():
        # Without an operator of torch's, each of which gives Python's lock to another thread.
        return [memoryview((ctypes.c_char * piece.nbytes).from_address(piece.data_ptr()))]
    return [row.data for row in piece.view(torch.uint8).numpy()]


def read_into(descriptor: int, path: Path, name: str, position: int, buffers: Sequence[memoryview]) -> None:
    """Fill the buffers, one after another, with the file's bytes from `position` on."""
    left = list(buffers)
    first = 0
    while first < len(left):
        # Linux moves at most 2 GiB a call.
        try:
            count = os.preadv(descriptor, left[first : first + MAX_BUFFERS], position)
        except OSError as error:
            raise unreadable(path, error) from error
        if not count and len(left[first]):
            raise TruncatedFileError(
                f"the file ends at byte {position}, inside a tensor",
                file=path,
                tensor=name,
                rule="a checkpoint does not change while it is read",
                remedy="download the file again",
            )
        position += count
        while first < len(left) and count >= len(left[first]):
            count -= len(left[first])
            first += 1
        if count:
            left[first] = left[first][count:]
