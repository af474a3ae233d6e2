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

from .checkpoint import Read, opened, read_entries

#: One file's planned tensors: (source name, file, what is read of it, in file order).
FileRead = tuple[str, Path, list[Read]]
#: Where this is to be read to; None for memory of its own.
Destination = Callable[[Read], torch.Tensor | None]

#: Small tensors travel between threads together.
BATCH_BYTES = 8 << 20


@dataclass(slots=True)
class ReadLog:
    """What was read, in bytes."""

    bytes_read: int = 0


def stream(
    reads: Iterable[FileRead], log: ReadLog, destination: Destination = lambda read: None
) -> Generator[tuple[str, torch.Tensor], None, None]:
    """Yield (name, tensor) for every planned tensor, read to its `destination` or else to memory of its own.

    Two threads read ahead of the consumer, each a batch of small tensors or one large tensor at a time: beyond what
    the consumer keeps, at most three times the largest tensor's bytes are alive (of tensors whose rows stand in turns
    in one matrix, that matrix and all of them).
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
                name, tensor, nbytes = batch.pop()
                log.bytes_read += nbytes
                yield name, tensor
                del tensor


def _batches(reads: list[FileRead], files: ExitStack) -> Iterator[tuple[int, Path, list[Read]]]:
    """(open file, its path, tensors that are read together), in file order."""
    limit = min(BATCH_BYTES, max((read.nbytes for _, _, entries in reads for read in entries), default=0))
    for _, path, entries in reads:
        descriptor = files.enter_context(opened(path))
        batch: list[Read] = []
        size = 0
        for read in entries:
            length = read.nbytes
            if batch and size + length > limit and not read.shares(batch[-1]):
                yield descriptor, path, batch
                batch, size = [], 0
            batch.append(read)
            size += length
        yield descriptor, path, batch


def _read(
    descriptor: int, path: Path, entries: list[Read], destination: Destination
) -> list[tuple[str, torch.Tensor, int]]:
    return list(read_entries(descriptor, path, entries, destination))


def sha256(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes in row-major order, as hexadecimal."""
    data = tensor.detach().cpu().contiguous()
    return hashlib.sha256(data.reshape(-1).view(torch.uint8).numpy().data).hexdigest()
