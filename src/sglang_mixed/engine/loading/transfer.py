"""How bytes get from files into parameters and, for the proof, back: straight on the host, page-locked with a GPU.

Python's lock is what a load waits for where tensors are small, and every operator of torch's lends it to another
thread. So with a GPU one thread calls torch, and the others do what needs no lock: they read, and they hash.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Protocol

import torch

from ...checkpoint import Read, read_packed
from ...formats.base import TORCH_DTYPES
from ...stream import READERS, FileRead, ReadLog, batches, sha256, stream

#: Bytes of page-locked memory that a batch of small tensors passes through. To lock a MiB takes a millisecond.
SLAB = 4 << 20
#: Bytes of tensors that get page-locked memory of their own: what is larger would lock more than it saves.
PINNED_TO = 64 << 20
#: Bytes on their way to the GPU, beside those in slabs, until they are waited for.
IN_FLIGHT = 128 << 20
#: The strictest alignment of a dtype, and of the processor's copies.
ALIGNMENT = 64
MOST_READERS, MOST_HASHERS = 8, 16


class Receiver(Protocol):
    """What is being loaded."""

    def destination(self, read: Read) -> torch.Tensor | None:
        """Where a tensor is to be read to; None for memory of its own."""

    def deliver(self, name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        """Take a tensor, by `Transfer.copy`, or return what others are to be given."""

    def takes(self, read: Read) -> bool:
        """Whether `deliver` will take the tensor."""


class Transfer:
    """Of parameters in the memory that files are read to."""

    def stream(self, reads: Sequence[FileRead], log: ReadLog, receiver: Receiver) -> Iterator[tuple[str, torch.Tensor]]:
        """Read and deliver; yields what others are to be given. At the end all copies have arrived."""
        yield from stream(reads, log, receiver.destination, receiver.deliver)

    def host(self, read: Read) -> torch.Tensor | None:
        """Where a tensor is to be read to that has no place of its own on the host; None for memory of its own."""
        return None

    def copy(self, place: torch.Tensor, tensor: torch.Tensor) -> None:
        """Copy what was read; with a GPU, begin to."""
        place.copy_(tensor)

    def hashes(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, str]]:
        """(name, SHA-256 of the tensor's bytes in row-major order, as hexadecimal)."""
        return ((name, sha256(tensor)) for name, tensor in tensors)

    def close(self) -> None:
        """What was borrowed is given back."""


class PinnedTransfer(Transfer):
    """To the current GPU and back. Small tensors travel in batches, each through a slab."""

    def __init__(self) -> None:
        cores = len(os.sched_getaffinity(0)) // torch.cuda.device_count()
        self._readers, self._hashers = (max(READERS, min(most, cores)) for most in (MOST_READERS, MOST_HASHERS))
        self._device = torch.cuda.current_device()
        self._slabs: deque[Slab] = deque()
        self._places: list[torch.Tensor] = []
        self._tensors: list[torch.Tensor] = []
        self._nbytes = 0

    def stream(self, reads: Sequence[FileRead], log: ReadLog, receiver: Receiver) -> Iterator[tuple[str, torch.Tensor]]:
        """Small tensors that have a place first, and then all others."""

        def is_small(read: Read) -> bool:
            return read.nbytes <= SLAB and read.entry.view is None and receiver.takes(read)

        small, others = _chosen(reads, is_small), _chosen(reads, lambda read: not is_small(read))
        self._stream_small(small, log, receiver)
        for name, tensor in stream(others, log, receiver.destination, readers=self._readers):
            if (given := receiver.deliver(name, tensor)) is not None:
                yield name, given
        self._send()
        torch.cuda.synchronize()

    def host(self, read: Read) -> torch.Tensor | None:
        """Page-locked memory, which torch's allocator lends to nobody else while a copy still reads from it."""
        if read.nbytes > PINNED_TO:
            return None
        torch.cuda.set_device(self._device)  # of this thread
        return _pinned(read.shape, TORCH_DTYPES[read.entry.dtype])

    def copy(self, place: torch.Tensor, tensor: torch.Tensor) -> None:
        """With others, by one call."""
        self._places.append(place)
        self._tensors.append(tensor)
        self._nbytes += tensor.nbytes
        if self._nbytes > IN_FLIGHT:
            self._send()
            torch.cuda.synchronize()

    def hashes(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, str]]:
        """Small ones in batches, and what is larger in pieces."""
        prepared: deque[tuple[Slab, list[str], Future[list[str]]]] = deque()
        with ThreadPoolExecutor(self._hashers, "weight-hasher", torch.cuda.set_device, (self._device,)) as pool:
            for batch in _small_together(tensors):
                if len(prepared) > self._hashers:
                    yield from self._finished(*prepared.popleft())
                slab, (names, parts) = self._free_slab(), zip(*batch, strict=True)
                if parts[0].nbytes > SLAB:
                    job = pool.submit(slab.sha256_in_pieces, parts[0])
                else:
                    sizes = [part.nbytes for part in parts]
                    places = _lay_out(sizes)
                    copies = [slab.view(at, part.shape, part.dtype) for at, part in zip(places, parts, strict=True)]
                    torch._foreach_copy_(copies, list(parts), non_blocking=True)
                    slab.use()
                    job = pool.submit(slab.sha256_of_each, places, sizes)
                prepared.append((slab, list(names), job))
            while prepared:
                yield from self._finished(*prepared.popleft())

    def close(self) -> None:
        """All page-locked memory."""
        self._slabs.clear()
        give_back = getattr(torch._C, "_host_emptyCache", None)  # private: torch 2.11 has no other name
        if give_back is not None:
            give_back()

    def _stream_small(self, reads: Sequence[FileRead], log: ReadLog, receiver: Receiver) -> None:
        """Readers fill slabs; from those tensors are delivered."""
        ahead: deque[tuple[Slab, list[Read], list[int], Future[None]]] = deque()
        with ExitStack() as files, ThreadPoolExecutor(self._readers, "weight-reader") as pool:
            jobs = batches(reads, files, SLAB, lambda read: _aligned(read.nbytes))
            while True:
                for _, descriptor, path, entries in itertools.islice(jobs, self._readers - len(ahead)):
                    slab = self._free_slab()
                    slab.wait()
                    places = _lay_out([read.nbytes for read in entries])
                    job = pool.submit(read_packed, descriptor, path, entries, slab.memory, places)
                    ahead.append((slab, entries, places, job))
                if not ahead:
                    return
                slab, entries, places, job = ahead.popleft()
                job.result()
                log.add(sum(read.nbytes for read in entries))
                for at, read in zip(places, entries, strict=True):
                    receiver.deliver(read.name, slab.view(at, read.shape, TORCH_DTYPES[read.entry.dtype]))
                self._send()
                slab.use()
                self._slabs.append(slab)

    def _finished(self, slab: Slab, names: list[str], job: Future[list[str]]) -> Iterator[tuple[str, str]]:
        yield from zip(names, job.result(), strict=True)
        self._slabs.append(slab)

    def _free_slab(self) -> Slab:
        return self._slabs.popleft() if self._slabs else Slab()

    def _send(self) -> None:
        if self._places:
            torch._foreach_copy_(self._places, self._tensors, non_blocking=True)
        self._places, self._tensors, self._nbytes = [], [], 0


class Slab:
    """Page-locked memory for a batch of tensors, and what the GPU still does with it."""

    def __init__(self) -> None:
        self._bytes = _pinned((SLAB,), torch.uint8)
        self._used = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.memory = self._bytes.numpy().data

    def use(self) -> None:
        """What was begun until now uses it."""
        self._used.record()

    def wait(self) -> None:
        """Until nothing uses it."""
        self._used.synchronize()

    def view(self, begin: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor in it."""
        return self._bytes[begin : begin + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

    def sha256_of_each(self, places: Sequence[int], sizes: Sequence[int]) -> list[str]:
        """Of its parts, once they have arrived."""
        self.wait()
        parts = (self.memory[begin : begin + size] for begin, size in zip(places, sizes, strict=True))
        return [hashlib.sha256(part).hexdigest() for part in parts]

    def sha256_in_pieces(self, tensor: torch.Tensor) -> list[str]:
        """Of a tensor of any size on the GPU."""
        digest, data = hashlib.sha256(), tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        for begin in range(0, len(data), SLAB):
            part = data[begin : begin + SLAB]
            self._bytes[: len(part)].copy_(part, non_blocking=True)
            self.use()
            self.wait()
            digest.update(self.memory[: len(part)])
        return [digest.hexdigest()]


def _chosen(reads: Sequence[FileRead], is_wanted: Callable[[Read], bool]) -> list[FileRead]:
    """Of each file the reads that are wanted; files of which any are."""
    found = [(source, path, list(filter(is_wanted, of))) for source, path, of in reads]
    return [file for file in found if file[2]]


def _lay_out(sizes: Sequence[int]) -> list[int]:
    """Where in a slab tensors of so many bytes begin, which with their alignment are at most `SLAB` together."""
    return list(itertools.accumulate(map(_aligned, sizes[:-1]), initial=0))


def _small_together(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """As many at a time as a slab holds, and what is larger alone."""
    batch: list[tuple[str, torch.Tensor]] = []
    left = SLAB
    for name, tensor in tensors:
        if batch and tensor.nbytes > left:
            yield batch
            batch, left = [], SLAB
        batch.append((name, tensor))
        left -= _aligned(tensor.nbytes)
    if batch:
        yield batch


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _pinned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, pin_memory=True)
