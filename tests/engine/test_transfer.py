"""Bytes on their way to a GPU and back; CUDA's copies and page-locked memory are stand-ins that keep count."""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sglang_mixed.checkpoint import Entry, Read
from sglang_mixed.engine.loading import transfer
from sglang_mixed.engine.loading.transfer import ALIGNMENT, IN_FLIGHT, PINNED_TO, SLAB, PinnedTransfer
from sglang_mixed.errors import TruncatedFileError
from sglang_mixed.stream import FileRead, ReadLog, sha256

from ..test_stream import open_reads


class StandInDevice:
    """What `PinnedTransfer` asks CUDA for, on the CPU: copies arrive when they are waited for, and not before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pending: deque[tuple[torch.Tensor, torch.Tensor]] = deque()
        self.most_pending = self.calls = self.pinned = self._pending_bytes = 0
        self.callers, self.chosen = set[int](), set[tuple[int, int]]()
        self._begun = 0
        self._working = threading.Lock()
        self._copy = torch.Tensor.copy_
        device = self

        class StandInEvent:
            """A place in the queue of copies."""

            def __init__(self) -> None:
                self._place = 0

            def record(self) -> None:
                self._place = device._begun

            def synchronize(self) -> None:
                device.arrive(self._place)

        for name, value in {
            "current_device": lambda: 3,
            "device_count": lambda: 1,
            "set_device": lambda number: self.chosen.add((threading.get_ident(), number)),
            "Event": StandInEvent,
            "synchronize": lambda: self.arrive(self._begun),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(transfer, "_pinned", self._lend)
        monkeypatch.setattr(torch, "_foreach_copy_", self._copy_all)
        monkeypatch.setattr(torch.Tensor, "copy_", self._copying())

    def arrive(self, place: int) -> None:
        with self._working:
            while self.pending and self._begun - len(self.pending) < place:
                to, tensor = self.pending.popleft()
                self._pending_bytes -= tensor.nbytes
                self._copy(to, tensor)

    def _begin(self, to: torch.Tensor, tensor: torch.Tensor) -> None:
        with self._working:
            self._begun += 1
            self.pending.append((to, tensor))
            self._pending_bytes += tensor.nbytes
            self.most_pending = max(self.most_pending, self._pending_bytes)

    def _lend(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        found = torch.empty(shape, dtype=dtype)
        self.pinned += found.nbytes
        return found

    def _copy_all(self, places: list[torch.Tensor], tensors: list[torch.Tensor], non_blocking: bool) -> None:
        assert non_blocking
        self.calls += 1
        self.callers.add(threading.get_ident())
        for place, tensor in zip(places, tensors, strict=True):
            assert place.shape == tensor.shape
            self._begin(place, tensor)

    def _copying(self) -> Callable[..., torch.Tensor]:
        def copy(place: torch.Tensor, tensor: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
            if not non_blocking:
                return self._copy(place, tensor)
            self._begin(place, tensor)
            return place

        return copy


class Places:
    """A receiver that has a place for some tensors and gives the others back."""

    def __init__(self, one: PinnedTransfer, tensors: dict[str, torch.Tensor], has_none: Sequence[str] = ()) -> None:
        self._transfer, self._none = one, has_none
        self.places = {name: torch.zeros_like(tensor) for name, tensor in tensors.items() if name not in has_none}
        self.order: list[str] = []

    def takes(self, read: Read) -> bool:
        return read.name in self.places

    def destination(self, read: Read) -> torch.Tensor | None:
        return self._transfer.host(read)

    def deliver(self, name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        self.order.append(name)
        if name not in self.places:
            return tensor
        self._transfer.copy(self.places[name], tensor)
        return None


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> StandInDevice:
    return StandInDevice(monkeypatch)


def write(folder: Path, **tensors: torch.Tensor) -> list[FileRead]:
    save_file(tensors, folder / "model.safetensors")
    return list(open_reads(folder))


def of_sizes(*sizes: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(sizes))
    return {
        f"t{number}": torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
        for number, size in enumerate(sizes)
    }


@pytest.mark.parametrize(("nbytes", "is_pinned"), [(1, True), (PINNED_TO, True), (PINNED_TO + 1, False)])
def test_tensors_of_moderate_size_get_page_locked_memory_of_their_own(
    device: StandInDevice, nbytes: int, is_pinned: bool
) -> None:
    found = PinnedTransfer().host(Read("one", Entry(0, "U8", (nbytes,), 0, nbytes)))
    assert (found is not None) == is_pinned
    assert found is None or found.nbytes == nbytes


def test_small_tensors_arrive_at_a_stand_in_for_a_gpu_in_few_calls_from_one_thread(
    device: StandInDevice, tmp_path: Path
) -> None:
    choose = random.Random(0)
    tensors = of_sizes(*(choose.randrange(SLAB // 50) for _ in range(300)))
    reads, one, log = write(tmp_path, **tensors), PinnedTransfer(), ReadLog()
    receiver = Places(one, tensors)
    assert list(one.stream(reads, log, receiver)) == []
    assert all(torch.equal(receiver.places[name], tensor) for name, tensor in tensors.items())
    assert receiver.order == [read.name for read in reads[0][2]]
    assert log.bytes_read == sum(tensor.nbytes for tensor in tensors.values())
    assert device.callers == {threading.get_ident()} and device.calls < 10
    assert device.pinned < 20 * SLAB


def test_what_has_no_place_is_given_on_in_memory_of_its_own(device: StandInDevice, tmp_path: Path) -> None:
    tensors = of_sizes(5, SLAB // 2, 7, SLAB // 2, 9, SLAB)
    reads, one = write(tmp_path, **tensors), PinnedTransfer()
    receiver = Places(one, tensors, has_none=("t0", "t3"))
    given = dict(one.stream(reads, ReadLog(), receiver))
    assert given.keys() == {"t0", "t3"}
    assert all(torch.equal(one, tensors[name]) for name, one in {**given, **receiver.places}.items())


def test_tensors_larger_than_a_slab_arrive_and_few_bytes_are_on_their_way_at_once(
    device: StandInDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "IN_FLIGHT", 4 * SLAB)
    tensors = of_sizes(*[SLAB + 3] * 9, PINNED_TO + 1, 11)
    reads, one = write(tmp_path, **tensors), PinnedTransfer()
    receiver = Places(one, tensors)
    assert list(one.stream(reads, ReadLog(), receiver)) == []
    assert all(torch.equal(receiver.places[name], tensor) for name, tensor in tensors.items())
    assert device.most_pending <= max(5 * SLAB + 3, PINNED_TO + 1 + 4 * SLAB) < IN_FLIGHT
    assert {number for _, number in device.chosen} == {3}


def test_scalars_fill_no_slab_beyond_its_end(device: StandInDevice, tmp_path: Path) -> None:
    count = SLAB // ALIGNMENT + 1000
    tensors = {f"t{number}": torch.tensor(float(number)) for number in range(count)}
    reads, one = write(tmp_path, **tensors), PinnedTransfer()
    receiver = Places(one, tensors)
    assert list(one.stream(reads, ReadLog(), receiver)) == []
    assert all(float(receiver.places[f"t{number}"]) == number for number in range(count))


def test_a_file_that_was_cut_names_the_tensor_it_ends_in(device: StandInDevice, tmp_path: Path) -> None:
    tensors = of_sizes(100, 200, 300)
    reads, one = write(tmp_path, **tensors), PinnedTransfer()
    last = reads[0][2][-1]
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(last.entry.end - 1)
    with pytest.raises(TruncatedFileError) as caught:
        list(one.stream(reads, ReadLog(), Places(one, tensors)))
    assert caught.value.tensor == last.name


@pytest.mark.parametrize("sizes", [[0], [1], [SLAB], [SLAB + 1], [3 * SLAB + 5], [5, SLAB - 5, SLAB, 0, 7, SLAB + 9]])
def test_hashes_of_tensors_small_and_large_are_those_of_their_bytes(device: StandInDevice, sizes: list[int]) -> None:
    tensors = {str(size): torch.randint(0, 256, (size,), dtype=torch.uint8) for size in sizes}
    tensors |= {f"float {size}": torch.randn(size // 4) for size in sizes}
    assert dict(PinnedTransfer().hashes(tensors.items())) == {name: sha256(one) for name, one in tensors.items()}


def test_many_hashes_take_few_slabs(device: StandInDevice) -> None:
    tensors, one = of_sizes(*[SLAB // 2] * 100), PinnedTransfer()
    assert dict(one.hashes(tensors.items())) == {name: sha256(tensor) for name, tensor in tensors.items()}
    lent = device.pinned
    assert lent <= (transfer.MOST_HASHERS + 2) * SLAB
    list(one.hashes(tensors.items()))
    assert device.pinned == lent
    one.close()
    list(one.hashes(tensors.items()))
    assert device.pinned == 2 * lent


def test_a_hash_of_columns_is_their_bytes_in_row_major_order(device: StandInDevice) -> None:
    small, large = torch.randn(64, 48).bfloat16()[:, 8:24], torch.randn(SLAB // 32, 48).bfloat16()[:, 8:28]
    found = dict(PinnedTransfer().hashes([("small", small), ("large", large)]))
    assert found == {"small": sha256(small), "large": sha256(large)}
