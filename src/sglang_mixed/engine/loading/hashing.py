"""SHA-256 of tensors on the GPU, by threads beside the one that loads, while others are read."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch

from .batches import together
from .slabs import Copies, Slab, lay_out

Named = tuple[str, torch.Tensor]


class Job(NamedTuple):
    """What a slab is used for."""

    slab: Slab
    names: Sequence[str]
    digests: Future[list[str]]


class Hasher:
    """Small tensors in batches, each through a slab, and what is larger in pieces."""

    def __init__(self, slabs: Sequence[Slab], device: int) -> None:
        self._free, self._limit = deque(slabs), len(slabs[0])
        self._threads = ThreadPoolExecutor(len(slabs), "weight-hasher", torch.cuda.set_device, (device,))
        self._waiting: deque[Named] = deque()
        self._jobs: deque[Job] = deque()
        self._found: dict[str, str] = {}
        self._copies = Copies()

    def add(self, tensors: Iterable[Named]) -> None:
        """Nothing will write to these tensors once the copies have arrived that have begun."""
        self._waiting.extend(tensors)

    def begin(self) -> None:
        """As much as there are slabs for."""
        while self._jobs and self._jobs[0].digests.done():
            self._end_first()
        while self._waiting and self._free:
            batch = next(together(self._waiting, self._limit, lambda named: named[1].nbytes))
            for _ in batch:
                self._waiting.popleft()
            self._begin(self._free.popleft(), batch)

    def finish(self) -> dict[str, str]:
        """Name -> SHA-256 of the tensor's bytes in row-major order, as hexadecimal; of all that were added."""
        self.begin()
        while self._waiting or self._jobs:
            self._end_first()
            self.begin()
        self._threads.shutdown()
        return self._found

    def _begin(self, slab: Slab, batch: Sequence[Named]) -> None:
        names, parts = zip(*batch, strict=True)
        sizes = [part.nbytes for part in parts]
        if sizes[0] > self._limit:
            job = self._threads.submit(slab.sha256_in_pieces, parts[0])
        else:
            places = lay_out(sizes)
            for place, part in zip(places, parts, strict=True):
                self._copies.add(slab.on_device(place, part.shape, part.dtype), part)
            self._copies.begin()
            slab.fetch(places[-1] + sizes[-1])
            job = self._threads.submit(slab.sha256_of, places, sizes)
        self._jobs.append(Job(slab, names, job))

    def _end_first(self) -> None:
        slab, names, digests = self._jobs.popleft()
        self._found.update(zip(names, digests.result(), strict=True))
        self._free.append(slab)
