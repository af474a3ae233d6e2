"""Reading the planned tensors: each file opened once, in file order, by positioned reads.

A memory map is not used: a file that is truncated while it is mapped kills the process with SIGBUS.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from .checkpoint import Entry, opened, read_entry

#: One file's planned tensors: (source name, file, [(tensor name, entry), ...] in file order).
FileRead = tuple[str, Path, list[tuple[str, Entry]]]
#: Where a tensor of this name is to be read to; None for memory of its own.
Destination = Callable[[str], torch.Tensor | None]


#: Small tensors travel between threads together.
BATCH_BYTES = 8 << 20


@dataclass(slots=True)
class ReadLog:
    """What was read, in bytes."""

    bytes_read: int = 0


def stream(
    reads: Iterable[FileRead], log: ReadLog, destination: Destination = lambda name: None
) -> Generator[tuple[str, torch.Tensor], None, None]:
    """Yield (name, tensor) for every planned tensor, read to its `destination` or else to memory of its own.

    Two threads read ahead of the consumer, each a batch of small tensors or one large tensor at a time: beyond what
    the consumer keeps, at most three times the largest tensor's bytes are alive.
    Raises MissingFileError, TruncatedFileError.
    """
    planned = list(reads)
    with ExitStack() as files, ThreadPoolExecutor(2, "weight-reader") as readers:
        jobs = _batches(planned, files)
        ahead = deque(readers.submit(_read, *job, destination) for job in islice(jobs, 2))
        while ahead:
            batch = ahead.popleft().result()
            ahead.extend(readers.submit(_read, *job, destination) for job in islice(jobs, 1))
            batch.reverse()
            while batch:
                log.bytes_read += batch[-1][1].nbytes
                yield batch.pop()


def _batches(reads: list[FileRead], files: ExitStack) -> Iterator[tuple[int, Path, list[tuple[str, Entry]]]]:
    """(open file, its path, tensors that are read together), in file order."""
    largest = max((entry.end - entry.begin for _, _, entries in reads for _, entry in entries), default=0)
    limit = min(BATCH_BYTES, largest)
    for _, path, entries in reads:
        descriptor = files.enter_context(opened(path))
        batch: list[tuple[str, Entry]] = []
        size = 0
        for name, entry in entries:
            length = entry.end - entry.begin
            if batch and size + length > limit:
                yield descriptor, path, batch
                batch, size = [], 0
            batch.append((name, entry))
            size += length
        yield descriptor, path, batch


def _read(
    descriptor: int, path: Path, entries: list[tuple[str, Entry]], destination: Destination
) -> list[tuple[str, torch.Tensor]]:
    return [(name, read_entry(descriptor, path, name, entry, destination(name))) for name, entry in entries]


def sha256(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes in row-major order, as hexadecimal."""
    data = tensor.detach().cpu().contiguous()
    return hashlib.sha256(data.reshape(-1).view(torch.uint8).numpy().data).hexdigest()
