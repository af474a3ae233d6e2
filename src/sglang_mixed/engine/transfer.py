"""How bytes get from files into parameters and, for the proof, back: straight on the host, page-locked with a GPU."""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections.abc import Iterable, Iterator

import torch

from ..checkpoint import Read
from ..formats.base import TORCH_DTYPES
from ..stream import BATCH_BYTES, READERS, sha256

#: Bytes of tensors that get page-locked memory of their own: what is larger would lock more than it saves.
PINNED_TO = 64 << 20
#: Bytes of a half of a lane's memory: a batch that a thread reads at once fits in it.
HALF = BATCH_BYTES
#: Bytes on their way to the GPU for each thread until it waits for them.
IN_FLIGHT = 32 << 20
#: The strictest alignment of a dtype, and of the processor's copies.
ALIGNMENT = 64
MOST_READERS, MOST_HASHERS = 8, 16


class Transfer:
    """Of parameters in the memory that files are read to."""

    #: How many read, and how many hash.
    readers, hashers = READERS, 1

    def staged(self, read: Read) -> torch.Tensor | None:
        """Where a tensor is to be read to that will be given to `copy`; None for memory of its own."""
        return None

    def host(self, read: Read) -> torch.Tensor | None:
        """Where a tensor is to be read to that others will copy; None for memory of its own."""
        return None

    def copy(self, place: torch.Tensor, tensor: torch.Tensor) -> None:
        """Begin to copy what was read. The tensor may be let go, the place not be read before `finish`."""
        place.copy_(tensor)

    def finish(self) -> None:
        """All copies have arrived."""

    def close(self) -> None:
        """What was borrowed is given back."""

    def hashes(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, str]]:
        """(name, SHA-256 of the tensor's bytes in row-major order, as hexadecimal)."""
        return ((name, sha256(tensor)) for name, tensor in tensors)


class PinnedTransfer(Transfer):
    """To the current GPU and back, each thread by a lane of its own."""

    def __init__(self) -> None:
        cores = len(os.sched_getaffinity(0)) // torch.cuda.device_count()
        self.readers, self.hashers = (max(READERS, min(most, cores)) for most in (MOST_READERS, MOST_HASHERS))
        self._device = torch.cuda.current_device()
        #: Thread -> its lane; lanes whose threads have ended.
        self._lanes: dict[int, Lane] = {}
        self._idle: list[Lane] = []

    def staged(self, read: Read) -> torch.Tensor | None:
        """A part of the lane's memory."""
        lane, dtype = self._lane(), TORCH_DTYPES[read.entry.dtype]
        return lane.lend(read.shape, dtype) if read.nbytes <= HALF else self.host(read)

    def host(self, read: Read) -> torch.Tensor | None:
        """Page-locked memory, which torch's allocator lends to nobody else while a copy still reads from it."""
        self._lane()  # a thread's first call to CUDA chooses its GPU
        return _pinned(read.shape, TORCH_DTYPES[read.entry.dtype]) if read.nbytes <= PINNED_TO else None

    def copy(self, place: torch.Tensor, tensor: torch.Tensor) -> None:
        """With others that the lane has gathered."""
        self._lane().gather(place, tensor)

    def finish(self) -> None:
        """Send what is left, wait for all of it, and keep the lanes for other threads."""
        self._idle += self._lanes.values()
        self._lanes.clear()
        for lane in self._idle:
            lane.send()
        torch.cuda.synchronize()

    def close(self) -> None:
        """All page-locked memory. No thread of another call copies any longer."""
        self._idle.clear()
        self._lanes.clear()
        give_back = getattr(torch._C, "_host_emptyCache", None)  # private: torch 2.11 has no other name
        if give_back is not None:
            give_back()

    def hashes(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, str]]:
        """As many tensors at once as the lane's memory holds, and what is larger in pieces."""
        lane, batch, nbytes = self._lane(), dict[str, torch.Tensor](), 0
        for name, tensor in tensors:
            if tensor.nbytes > HALF:
                yield name, lane.sha256(tensor)
                continue
            if nbytes + tensor.nbytes > HALF:
                yield from zip(batch, lane.sha256_of_each(list(batch.values())), strict=True)
                batch, nbytes = {}, 0
            batch[name] = tensor
            nbytes += _aligned(tensor.nbytes)
        yield from zip(batch, lane.sha256_of_each(list(batch.values())), strict=True)

    def _lane(self) -> Lane:
        thread = threading.get_ident()
        if (lane := self._lanes.get(thread)) is None:
            torch.cuda.set_device(self._device)
            lane = self._lanes[thread] = self._idle.pop() if self._idle else Lane()
        return lane


class Lane:
    """A stream, and page-locked memory in two halves: one fills while the GPU copies from the other."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        # What the main thread has begun, such as zeros in all parameters, comes first.
        self._stream.wait_stream(torch.cuda.default_stream())
        self._halves = [_pinned((HALF,), torch.uint8) for _ in range(2)]
        self._left = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]
        self._used = self._nbytes = 0
        self._places: list[torch.Tensor] = []
        self._tensors: list[torch.Tensor] = []

    def lend(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory for a tensor of at most `HALF` bytes, until it was sent."""
        nbytes = math.prod(shape) * dtype.itemsize
        if self._used + nbytes > HALF:
            self._turn()
        begin, self._used = self._used, self._used + _aligned(nbytes)
        return self._halves[0][begin : begin + nbytes].view(dtype).view(shape)

    def gather(self, place: torch.Tensor, tensor: torch.Tensor) -> None:
        """Send it with others."""
        self._places.append(place)
        self._tensors.append(tensor)
        self._nbytes += tensor.nbytes
        if self._nbytes > IN_FLIGHT:
            self.send()
            self._stream.synchronize()
            self._used = 0

    def send(self) -> None:
        """Begin to copy what was gathered."""
        if self._places:
            with torch.cuda.stream(self._stream):
                torch._foreach_copy_(self._places, self._tensors, non_blocking=True)
            self._places, self._tensors, self._nbytes = [], [], 0

    def sha256(self, tensor: torch.Tensor) -> str:
        """Of a tensor of any size, a piece after the other."""
        half, digest = self._halves[0], hashlib.sha256()
        with torch.cuda.stream(self._stream):
            data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            for begin in range(0, len(data), HALF):
                part = data[begin : begin + HALF]
                piece = half[: len(part)].copy_(part, non_blocking=True)
                self._stream.synchronize()
                digest.update(piece.numpy().data)
        return digest.hexdigest()

    def sha256_of_each(self, tensors: list[torch.Tensor]) -> Iterator[str]:
        """Of tensors that fit in one half together."""
        self._used = 0
        copies = [self.lend(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
        ends = [copy.storage_offset() * copy.itemsize + copy.nbytes for copy in copies]
        for copy, tensor in zip(copies, tensors, strict=True):
            self.gather(copy, tensor)
        self.send()
        self._stream.synchronize()
        memory, self._used = self._halves[0].numpy().data, 0
        for end, tensor in zip(ends, tensors, strict=True):
            yield hashlib.sha256(memory[end - tensor.nbytes : end]).hexdigest()

    def _turn(self) -> None:
        """Send this half, and fill the other one once nothing is copied from it any longer."""
        self.send()
        self._left[0].record(self._stream)
        self._halves.reverse()
        self._left.reverse()
        self._left[0].synchronize()
        self._used = 0


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _pinned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, pin_memory=True)
