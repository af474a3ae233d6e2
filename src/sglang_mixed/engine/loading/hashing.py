"""SHA-256 of tensors on the GPU, while others are read: of a parameter as soon as nothing writes to it.

The GPU itself hashes what many threads can share out. A digest is one thread's work, so large tensors travel to the
host, whose threads are fewer and faster.
"""

from __future__ import annotations

import functools
import logging
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch

from ...kernels.sha256 import as_hexadecimal, can_hash, sha256_of, works
from .batches import together
from .slabs import Copies, Slab, lay_out

logger = logging.getLogger(__name__)

#: Bytes of a tensor up to which the GPU hashes it, which takes a thread of it a tenth of a second.
LARGEST_ON_GPU = 4 << 20
Named = tuple[str, torch.Tensor]


class Job(NamedTuple):
    """What a slab is used for."""

    slab: Slab
    names: Sequence[str]
    digests: Future[list[str]]


class Hasher:
    """By the GPU once `gpu_works` has come true; else small tensors in batches, large ones in pieces, through slabs."""

    def __init__(self, slabs: Sequence[Slab], device: int, gpu_works: Future[bool]) -> None:
        self._free, self._limit, self._gpu_works = deque(slabs), len(slabs[0]), gpu_works
        self._threads = ThreadPoolExecutor(len(slabs), "weight-hasher", torch.cuda.set_device, (device,))
        self._waiting: deque[list[Named]] = deque()
        self._jobs: deque[Job] = deque()
        self._found: dict[str, str] = {}
        self._copies = Copies()
        self._waiting_for_gpu: deque[list[Named]] = deque()
        #: What the GPU hashes, kept as it is until the digests are there.
        self._on_gpu: list[tuple[list[Named], torch.Tensor]] = []
        self._stream: torch.cuda.Stream | None = None

    def add(self, tensors: Iterable[Named]) -> None:
        """Nothing will write to these tensors once the copies have arrived that have begun."""
        tensors = list(tensors)
        if self._gpu_works.done() and self._gpu_works.result():
            chosen = [one for one in tensors if one[1].nbytes <= LARGEST_ON_GPU and can_hash(one[1])]
            names = {name for name, _ in chosen}
            tensors = [one for one in tensors if one[0] not in names]
            self._waiting_for_gpu.extend([chosen] if chosen else [])
        self._waiting.extend(together(tensors, self._limit))

    def begin(self) -> None:
        """As much as there are slabs for, and all that the GPU hashes."""
        while self._waiting_for_gpu:
            self._begin_on_gpu(self._waiting_for_gpu.popleft())
        while self._jobs and self._jobs[0].digests.done():
            self._end_first()
        while self._waiting and self._free:
            self._begin(self._free.popleft(), self._waiting.popleft())

    def finish(self) -> dict[str, str]:
        """Name -> SHA-256 of the tensor's bytes in row-major order, as hexadecimal; of all that were added."""
        self.begin()
        while self._waiting or self._jobs:
            self._end_first()
            self.begin()
        self._threads.shutdown()
        if self._stream is not None:
            self._stream.synchronize()
        for tensors, digests in self._on_gpu:
            self._found.update(zip((name for name, _ in tensors), as_hexadecimal(digests.cpu()), strict=True))
        self._on_gpu.clear()
        return self._found

    def _begin_on_gpu(self, tensors: list[Named]) -> None:
        """Beside the copies that follow, behind those that have begun."""
        if self._stream is None:
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._on_gpu.append((tensors, sha256_of([tensor for _, tensor in tensors])))

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


@functools.cache
def can_gpu_hash(device: int) -> bool:
    """Whether that GPU, which must be the current one, has the host's digests; if not, the host hashes all."""
    try:
        return works()
    except Exception as error:  # no compiler, another Triton: the proof is made in any case
        logger.warning(
            "GPU %d cannot hash weights for the proof, the host does: %s: %s", device, type(error).__name__, error
        )
        return False
