"""Reading the planned tensors: each file opened once, in file order, by positioned reads.

A memory map is not used: a file that is truncated while it is mapped kills the process with SIGBUS.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from .checkpoint import Read, opened, read_entries

#: One file's planned tensors: (source name, file, what is read of it, in file order).
FileRead = tuple[str, Path, list[Read]]
#: Where this is to be read to; None for memory of its own. Called by the thread that reads, before it reads.
Destination = Callable[[Read], torch.Tensor | None]
#: Takes a tensor by its name; what it returns goes on to the consumer. Called by the thread that has read it, at once.
Receive = Callable[[str, torch.Tensor], torch.Tensor | None]

#: Small tensors travel between threads together.
BATCH_BYTES = 8 << 20
READERS = 2


@dataclass(slots=True)
class ReadLog:
    """What was read, in bytes, and who is told of more."""

    bytes_read: int = 0
    advance: Callable[[int], object] = lambda nbytes: None

    def add(self, nbytes: int) -> None:
        """So many more."""
        self.bytes_read += nbytes
        self.advance(nbytes)


def stream(
    reads: Iterable[FileRead],
    log: ReadLog,
    destination: Destination = lambda read: None,
    receive: Receive = lambda name, tensor: tensor,
    readers: int = READERS,
) -> Generator[tuple[str, torch.Tensor], None, None]:
    """Yield (name, tensor) of what `receive` lets through, read to its `destination` or else to memory of its own.

    `readers` threads read ahead of the consumer, each a batch of small tensors or one large tensor at a time: beyond
    what consumer and receiver keep, at most one more than `readers` times the largest tensor's bytes are alive, or
    twice as many batches (of tensors whose rows stand in turns in one matrix, that matrix and all of them).
    Raises MissingFileError, TruncatedFileError.
    """
    planned = list(reads)
    with ExitStack() as files, ThreadPoolExecutor(readers, "weight-reader") as pool:
        limit = min(BATCH_BYTES, max((read.nbytes for _, _, entries in planned for read in entries), default=0))
        jobs = _batches(planned, files, limit)
        ahead: deque[tuple[int, Future[_Batch]]] = deque()
        while True:
            while len(ahead) < readers or sum(size for size, _ in ahead) < readers * limit:
                if (job := next(jobs, None)) is None:
                    break
                size, descriptor, path, entries = job
                ahead.append((size, pool.submit(_read, descriptor, path, entries, destination, receive)))
            if not ahead:
                return
            batch, nbytes = ahead.popleft()[1].result()
            log.add(nbytes)
            batch.reverse()
            while batch:
                name, tensor = batch.pop()
                yield name, tensor
                del tensor


def _batches(reads: Iterable[FileRead], files: ExitStack, limit: int) -> Iterator[tuple[int, int, Path, list[Read]]]:
    """(size, open file, its path, tensors that are read together), in file order.

    No batch has more than the limit, except what is larger alone and views that one reading serves.
    """
    for _, path, entries in reads:
        descriptor = files.enter_context(opened(path))
        batch: list[Read] = []
        size = 0
        for read in entries:
            if batch and size + read.nbytes > limit and not read.shares(batch[-1]):
                yield size, descriptor, path, batch
                batch, size = [], 0
            batch.append(read)
            size += read.nbytes
        yield size, descriptor, path, batch


#: What is yielded of a batch, and the bytes that were read for all of it.
_Batch = tuple[list[tuple[str, torch.Tensor]], int]


def _read(descriptor: int, path: Path, entries: list[Read], destination: Destination, receive: Receive) -> _Batch:
    kept, total = [], 0
    for name, tensor, nbytes in read_entries(descriptor, path, entries, destination):
        total += nbytes
        if (given := receive(name, tensor)) is not None:
            kept.append((name, given))
    return kept, total
