"""How bytes get from files into parameters, and are hashed there: straight on the host, page-locked with a GPU.

Python's lock is what a load waits for where tensors are small, and every operator of torch's lends it to another
thread. So with a GPU one thread calls torch, and the others do what needs no lock: they read. The GPU hashes.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Protocol

import torch

from ...checkpoint import Piece, Read
from ...digests import sha256
from ...formats.base import TORCH_DTYPES
from ...stream import FileRead, ReadLog, stream
from .batches import Batch, batches
from .hashing import Hasher, prepare
from .slabs import Copies, Slab, as_bytes

#: Page-locked memory through which all tensors pass, in slabs. To lock a MiB may take a millisecond.
SLAB, SLABS = 8 << 20, 6
#: Bytes of a view of a matrix that gets page-locked memory of its own: what is larger would lock more than it saves.
PINNED_TO = 64 << 20


class Receiver(Protocol):
    """What is being loaded."""

    def takes(self, read: Read) -> bool:
        """Whether `deliver` will take the tensor."""

    def is_only_codes(self, read: Read) -> bool:
        """Whether nothing but an e4m3 code that is no number could be wrong with the tensor's values."""

    def check(self, name: str, tensor: torch.Tensor) -> None:
        """Raise InvalidValueError for a tensor that cannot be what it is said to be."""

    def destination(self, read: Read) -> torch.Tensor | None:
        """Where a tensor is to be read to; None for memory of its own."""

    def deliver(self, name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        """Take a tensor, by `Transfer.copy`, or return what others are to be given."""


class Transfer:
    """Of parameters in the memory that files are read to."""

    #: Names of tensors that are hashed already.
    completed: AbstractSet[str] = frozenset()

    def stream(self, reads: Sequence[FileRead], log: ReadLog, receiver: Receiver) -> Iterator[tuple[str, torch.Tensor]]:
        """Read, check and deliver; yields what others are to be given. At the end all copies have arrived."""

        def receive(name: str, tensor: torch.Tensor) -> torch.Tensor | None:
            receiver.check(name, tensor)
            return receiver.deliver(name, tensor)

        yield from stream(reads, log, receiver.destination, receive)

    def memory(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor | None:
        """For a tensor that has no place yet; None for the host's."""
        return None

    def copy(self, place: torch.Tensor, tensor: torch.Tensor) -> None:
        """Copy what was read; with a GPU, begin to."""
        place.copy_(tensor)

    def complete(self, name: str, tensor: torch.Tensor) -> None:
        """Nothing will be copied to the tensor but what has been."""

    def hashes(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Mapping[str, str]:
        """Name -> SHA-256 of the tensor's bytes in row-major order; by a GPU the root of a tree of them."""
        return {name: sha256(tensor) for name, tensor in tensors}

    def close(self) -> None:
        """What was borrowed is given back."""


class PinnedTransfer(Transfer):
    """To the current GPU and back: few threads read, one speaks to the GPU, and what can wait for the end does."""

    def __init__(self) -> None:
        self._device = torch.cuda.current_device()
        # Memory that is page-locked takes its time, as does a kernel at a first start: a thread asks for them while the
        # model is built.
        asking = ThreadPoolExecutor(1, "weight-memory", torch.cuda.set_device, (self._device,))
        self._memory = asking.submit(_slabs)
        asking.shutdown(wait=False)
        self._sent: Slab | None = None
        self._copies, self._hasher = Copies(), Hasher()
        #: What the tensor that comes in pieces is for, and what holds those that have come.
        self._growing: tuple[torch.Tensor, torch.Tensor] | None = None
        #: Batches of e4m3 codes, and whether any of these is no number, which the GPU will know.
        self._looked_at: list[tuple[Batch, torch.Tensor]] = []
        self.completed: set[str] = set()

    def stream(self, reads: Sequence[FileRead], log: ReadLog, receiver: Receiver) -> Iterator[tuple[str, torch.Tensor]]:
        """Views of matrices last. What others are given is on the GPU."""
        self._slabs = self._memory.result()
        views = _chosen(reads, lambda read: read.entry.view is not None)
        yield from self._stream_pieces(_chosen(reads, lambda read: read.entry.view is None), log, receiver)
        for name, tensor, read in self._stream_views(views, log):
            receiver.check(name, tensor)
            yield from self._arrived(read, tensor, tensor, receiver)
        torch.cuda.synchronize()
        self._look_again(reads, receiver)

    def memory(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor | None:
        """On the GPU."""
        return on_device(shape, dtype)

    def copy(self, place: torch.Tensor, tensor: torch.Tensor) -> None:
        """What a slab has brought, with others, from where that is on the GPU."""
        twin = self._sent.twin(tensor) if self._sent else None
        if twin is None:
            place.copy_(tensor, non_blocking=True)
        else:
            self._copies.add(place, twin)

    def complete(self, name: str, tensor: torch.Tensor) -> None:
        """It is hashed with others."""
        self._hasher.add([(name, tensor)])
        self.completed.add(name)

    def hashes(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Mapping[str, str]:
        """Once; those that were complete before are among them."""
        self._hasher.add(tensors)
        return self._hasher.finish()

    def close(self) -> None:
        """All memory of the GPU; what is page-locked, `give_back` gives back, which takes some time."""
        del self._memory, self._hasher, self._slabs

    def _stream_pieces(
        self, reads: Sequence[FileRead], log: ReadLog, receiver: Receiver
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Readers fill slabs, each of which is sent by one copy; from there tensors go to their places."""
        free, ahead = deque(self._slabs), deque[tuple[Slab, Batch, Future[None]]]()
        with ExitStack() as files, ThreadPoolExecutor(len(free) - 1, "weight-reader") as pool:
            jobs = batches(reads, files, len(free[0]), receiver.is_only_codes)
            while True:
                for descriptor, path, batch in itertools.islice(jobs, len(free)):
                    slab = free.popleft()
                    ahead.append((slab, batch, pool.submit(batch.fill, slab, descriptor, path)))
                if not ahead:
                    return
                slab, batch, job = ahead.popleft()
                job.result()
                log.add(sum(piece.nbytes for piece in batch.pieces))
                slab.send(batch.nbytes)
                if batch.codes:
                    self._looked_at.append((batch, slab.has_nan(batch.codes)))
                self._sent = slab
                for piece, place in zip(batch.pieces, batch.places, strict=True):
                    if piece.nbytes < piece.read.nbytes:
                        yield from self._grow(slab, piece, place, receiver)
                        continue
                    what = place, piece.read.shape, TORCH_DTYPES[piece.read.entry.dtype]
                    tensor = slab.on_host(*what)
                    if not receiver.is_only_codes(piece.read):
                        receiver.check(piece.read.name, tensor)
                    yield from self._arrived(piece.read, tensor, slab.on_device(*what), receiver)
                self._sent = None
                self._copies.begin()
                self._hasher.begin()
                free.append(slab)

    def _stream_views(self, reads: Sequence[FileRead], log: ReadLog) -> Iterator[tuple[str, torch.Tensor, Read]]:
        """Tensors that lie in turns in their matrices, in the host's memory."""
        by_name = {read.name: read for _, _, of in reads for read in of}

        def memory(read: Read) -> torch.Tensor | None:
            torch.cuda.set_device(self._device)  # of this thread
            return pinned(read.shape, TORCH_DTYPES[read.entry.dtype]) if read.nbytes <= PINNED_TO else None

        for name, tensor in stream(reads, log, memory, readers=len(self._slabs)):
            yield name, tensor, by_name[name]

    def _grow(self, slab: Slab, piece: Piece, place: int, receiver: Receiver) -> Iterator[tuple[str, torch.Tensor]]:
        """A piece of a tensor that is larger than a slab; with the last one the tensor has arrived."""
        read = piece.read
        if self._growing is None:
            to = receiver.destination(read)
            assert to is not None
            self._growing = to, to if to.is_contiguous() else torch.empty(to.shape, dtype=to.dtype, device=to.device)
        to, held = self._growing
        bytes_of = as_bytes(held)
        bytes_of[piece.begin : piece.end].copy_(slab.on_device(place, (piece.nbytes,), torch.uint8), non_blocking=True)
        if piece.end == read.nbytes:
            self._growing = None
            if not receiver.is_only_codes(read):
                receiver.check(read.name, held)
            if held is not to:
                to.copy_(held, non_blocking=True)
            if (given := receiver.deliver(read.name, to)) is not None:
                yield read.name, given

    def _arrived(
        self, read: Read, tensor: torch.Tensor, twin: torch.Tensor, receiver: Receiver
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """A tensor on the host, and where it can be copied from to the GPU."""
        if not receiver.takes(read):  # who is given a tensor may keep it: other tensors pass through a slab
            to = receiver.destination(read)
            assert to is not None
            tensor = to.copy_(twin, non_blocking=True)
        if (given := receiver.deliver(read.name, tensor)) is not None:
            yield read.name, given

    def _look_again(self, reads: Sequence[FileRead], receiver: Receiver) -> None:
        """Where a code was no number: which tensor's it was. Raises InvalidValueError."""
        if self._looked_at:
            flags = torch.stack([flag for _, flag in self._looked_at]).tolist()
            batches = (batch for (batch, _), flag in zip(self._looked_at, flags, strict=True) if flag)
            suspects = {piece.read.name for batch in batches for piece in batch.pieces}
            for name, tensor in stream(_chosen(reads, lambda read: read.name in suspects), ReadLog()):
                receiver.check(name, tensor)
            self._looked_at.clear()


def give_back() -> None:
    """Page-locked memory that nobody uses any longer, to the system."""
    if (empty := getattr(torch._C, "_host_emptyCache", None)) is not None:  # private: torch 2.11 has no other name
        empty()


def _slabs() -> list[Slab]:
    prepare()
    shape = (SLABS * SLAB,)
    return Slab(pinned(shape, torch.uint8), on_device(shape, torch.uint8)).split(SLABS)


def pinned(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Page-locked memory of the host."""
    return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True)


def on_device(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Memory of the current GPU."""
    return torch.empty(shape, dtype=dtype, device="cuda")


def _chosen(reads: Sequence[FileRead], is_wanted: Callable[[Read], bool]) -> list[FileRead]:
    """Of each file the reads that are wanted; files of which any are."""
    found = [(source, path, list(filter(is_wanted, of))) for source, path, of in reads]
    return [file for file in found if file[2]]
