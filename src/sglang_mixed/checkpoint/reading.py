"""Positioned reads of tensors. Never a memory map: a file truncated under a map kills the process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..errors import MissingFileError, TruncatedFileError
from ..formats.base import TORCH_DTYPES
from .header import Entry


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A file descriptor for positioned reads."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise MissingFileError(f"cannot open the file: {error.strerror}", file=path) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_entry(
    descriptor: int, path: Path, name: str, entry: Entry, destination: torch.Tensor | None = None
) -> torch.Tensor:
    """One tensor, in memory of its own or in a contiguous `destination` of its shape and dtype.

    Raises TruncatedFileError where the file has shrunk since its header was read.
    """
    if destination is None:
        data = torch.empty(entry.end - entry.begin, dtype=torch.uint8)
        destination = data.view(TORCH_DTYPES[entry.dtype]).reshape(entry.shape)
    else:
        assert (destination.dtype, destination.shape) == (TORCH_DTYPES[entry.dtype], entry.shape)
        data = destination.view(-1).view(torch.uint8)
    read_into(descriptor, path, name, entry.begin, data.numpy().data)
    return destination


def read_into(descriptor: int, path: Path, name: str, position: int, buffer: memoryview) -> None:
    """Fill `buffer` with the file's bytes from `position` on."""
    done = 0
    while done < len(buffer):
        # Linux moves at most 2 GiB a call.
        count = os.preadv(descriptor, [buffer[done:]], position + done)
        if not count:
            raise TruncatedFileError(
                f"the file ends at byte {position + done}, inside a tensor",
                file=path,
                tensor=name,
                rule="a checkpoint does not change while it is read",
                remedy="download the file again",
            )
        done += count
