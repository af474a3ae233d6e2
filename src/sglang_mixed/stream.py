"""Reading the planned tensors: each file opened once, in file order, by positioned reads.

A memory map is not used: a file that is truncated while it is mapped kills the process with SIGBUS.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .checkpoint import Entry, opened, read_entry

#: One file's planned tensors: (source name, file, [(tensor name, entry), ...] in file order).
FileRead = tuple[str, Path, list[tuple[str, Entry]]]


@dataclass(slots=True)
class ReadLog:
    """What was read: bytes, and per tensor name the SHA-256 of its bytes in the file."""

    bytes_read: int = 0
    sha256: dict[str, str] = field(default_factory=dict)


def stream(reads: Iterable[FileRead], log: ReadLog) -> Generator[tuple[str, torch.Tensor], None, None]:
    """Yield (name, tensor) for every planned tensor; each tensor owns its memory and may be kept.

    A thread reads and hashes ahead of the consumer: beyond what the consumer keeps, at most two tensors are alive.
    Raises MissingFileError or TruncatedFileError.
    """
    ahead: queue.Queue[tuple[str, torch.Tensor] | BaseException | None] = queue.Queue(maxsize=1)
    stop = threading.Event()

    def put(item: tuple[str, torch.Tensor] | BaseException | None) -> None:
        while not stop.is_set():
            try:
                ahead.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def read_ahead() -> None:
        try:
            with closing(_read_files(reads, log)) as tensors:
                for item in tensors:
                    put(item)
                    if stop.is_set():
                        return
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=read_ahead, name="weight-reader", daemon=True)
    thread.start()
    try:
        while (item := ahead.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
            # Without this the consumer's last tensor would stay alive while the next one is awaited.
            del item
    finally:
        stop.set()
        thread.join()


def _read_files(reads: Iterable[FileRead], log: ReadLog) -> Generator[tuple[str, torch.Tensor], None, None]:
    for _, path, entries in reads:
        with opened(path) as descriptor:
            for name, entry in entries:
                tensor = read_entry(descriptor, path, name, entry)
                log.bytes_read += tensor.nbytes
                log.sha256[name] = sha256(tensor)
                yield name, tensor


def sha256(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes in row-major order, as hexadecimal."""
    data = tensor.detach().cpu().contiguous()
    return hashlib.sha256(data.reshape(-1).view(torch.uint8).numpy().data).hexdigest()
