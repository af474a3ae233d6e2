"""How bytes get from files into parameters and, for the proof, back: straight on the host, page-locked with a GPU."""

from __future__ import annotations

import hashlib
import os
import threading
from typing import Any

import torch

from ..checkpoint import Read
from ..formats.base import TORCH_DTYPES
from ..stream import READERS, sha256

#: Bytes of tensors that are read to page-locked memory: what is smaller travels in a command, what is larger would
#: lock more than it saves.
PINNED_FROM, PINNED_TO = 64 << 10, 64 << 20
#: Bytes on their way to the GPU for each thread until it waits for them.
IN_FLIGHT = 32 << 20
#: What is hashed of a tensor at a time.
PIECE = 16 << 20
MOST_READERS, MOST_HASHERS = 8, 16


class Transfer:
    """Of parameters in the memory that files are read to."""

    #: How many read, and how many hash.
    readers, hashers = READERS, 1

    def host(self, read: Read) -> torch.Tensor | None:
        """Where a tensor is to be read to that has no place of its own there; None for memory of its own."""
        return None

    def copy(self, place: torch.Tensor, tensor: torch.Tensor) -> None:
        """Begin to copy what was read. The tensor may be let go, the place not be read before `finish`."""
        place.copy_(tensor)

    def finish(self) -> None:
        """All copies have arrived; what was borrowed for them is given back."""

    def sha256(self, tensor: torch.Tensor) -> str:
        """SHA-256 of a tensor's bytes in row-major order, as hexadecimal."""
        return sha256(tensor)


class PinnedTransfer(Transfer):
    """To the current GPU and back: each thread reads to page-locked memory and copies from it on a stream of its own.

    torch's allocator lends that memory, and lends none of it again that a copy still reads from. At most `IN_FLIGHT`
    bytes a thread are lent beyond what is alive in `stream`.
    """

    def __init__(self) -> None:
        cores = len(os.sched_getaffinity(0)) // torch.cuda.device_count()
        self.readers, self.hashers = (max(READERS, min(most, cores)) for most in (MOST_READERS, MOST_HASHERS))
        self._device = torch.cuda.current_device()
        self._lanes = threading.local()

    def host(self, read: Read) -> torch.Tensor | None:
        """Page-locked memory for tensors of moderate size."""
        self._stream()  # a thread's first call to CUDA chooses its GPU
        if not PINNED_FROM <= read.nbytes <= PINNED_TO:
            return None
        return _pinned(read.shape, TORCH_DTYPES[read.entry.dtype])

    def copy(self, place: torch.Tensor, tensor: torch.Tensor) -> None:
        """On this thread's stream."""
        stream = self._stream()
        with torch.cuda.stream(stream):
            place.copy_(tensor, non_blocking=True)
        self._lanes.nbytes += tensor.nbytes
        if self._lanes.nbytes > IN_FLIGHT:
            stream.synchronize()
            self._lanes.nbytes = 0

    def finish(self) -> None:
        """Wait for all streams."""
        torch.cuda.synchronize()
        _give_back_pinned()

    def sha256(self, tensor: torch.Tensor) -> str:
        """A piece after the other through page-locked memory, which the thread keeps until `finish`."""
        stream, digest = self._stream(), hashlib.sha256()
        if not hasattr(self._lanes, "piece"):
            self._lanes.piece = _pinned((PIECE,), torch.uint8)
        with torch.cuda.stream(stream):
            data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            for begin in range(0, len(data), PIECE):
                part = data[begin : begin + PIECE]
                piece = self._lanes.piece[: len(part)].copy_(part, non_blocking=True)
                stream.synchronize()
                digest.update(piece.numpy().data)
        return digest.hexdigest()

    def _stream(self) -> Any:
        if not hasattr(self._lanes, "stream"):
            torch.cuda.set_device(self._device)
            self._lanes.stream, self._lanes.nbytes = torch.cuda.Stream(), 0  # type: ignore[no-untyped-call]
            # What the main thread has begun, such as zeros in all parameters, comes first.
            self._lanes.stream.wait_stream(torch.cuda.default_stream())
        return self._lanes.stream


def _pinned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, pin_memory=True)


def _give_back_pinned() -> None:
    give_back = getattr(torch._C, "_host_emptyCache", None)  # private: torch 2.11 has no other name
    if give_back is not None:
        give_back()
