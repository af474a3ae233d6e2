"""Bytes on their way to a GPU and back; CUDA's streams and page-locked memory are stand-ins that keep count."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sglang_mixed.checkpoint import Entry, Read
from sglang_mixed.engine import transfer
from sglang_mixed.engine.transfer import HALF, IN_FLIGHT, PINNED_TO, Lane, PinnedTransfer
from sglang_mixed.stream import ReadLog, sha256, stream

from ..test_stream import open_reads


class StandInStream:
    """A CUDA stream whose copies arrive when it is waited for."""

    def __init__(self, device: StandInDevice) -> None:
        self.device, self.pending, self.most = device, list[tuple[torch.Tensor, torch.Tensor]](), 0
        device.streams.append(self)

    def wait_stream(self, other: object) -> None:
        assert other == "default"

    def copy(self, place: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        self.pending.append((place, tensor))
        self.most = max(self.most, sum(one.nbytes for _, one in self.pending))
        return place

    def synchronize(self) -> None:
        for place, tensor in self.pending:
            self.device.original_copy(place, tensor)
        self.pending.clear()


class StandInEvent:
    """A place in a stream: whoever waits for it waits for all that was begun before."""

    def record(self, stream: StandInStream) -> None:
        self._stream = stream

    def synchronize(self) -> None:
        if hasattr(self, "_stream"):
            self._stream.synchronize()


class StandInDevice:
    """What `PinnedTransfer` asks CUDA for, on the CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.streams: list[StandInStream] = []
        self.chosen: dict[int, int] = {}
        self.current = threading.local()
        self.original_copy = torch.Tensor.copy_
        for name, value in {
            "current_device": lambda: 3,
            "device_count": lambda: 1,
            "set_device": lambda device: self.chosen.update({threading.get_ident(): device}),
            "default_stream": lambda: "default",
            "Stream": lambda: StandInStream(self),
            "Event": StandInEvent,
            "stream": self._in_stream,
            "synchronize": lambda: [one.synchronize() for one in self.streams],
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(transfer, "_pinned", lambda shape, dtype: torch.empty(shape, dtype=dtype))
        monkeypatch.setattr(torch.Tensor, "copy_", self._copying())
        monkeypatch.setattr(torch, "_foreach_copy_", self._copy_all)

    @contextmanager
    def _in_stream(self, one: StandInStream) -> Iterator[None]:
        self.current.stream = one
        yield
        self.current.stream = None

    def _copy_all(self, places: list[torch.Tensor], tensors: list[torch.Tensor], non_blocking: bool) -> None:
        for place, tensor in zip(places, tensors, strict=True):
            place.copy_(tensor, non_blocking=non_blocking)

    def _copying(self) -> Callable[..., torch.Tensor]:
        def copy(place: torch.Tensor, tensor: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
            if non_blocking:
                found: torch.Tensor = self.current.stream.copy(place, tensor)
                return found
            return self.original_copy(place, tensor)

        return copy


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> StandInDevice:
    return StandInDevice(monkeypatch)


def read_of(nbytes: int) -> Read:
    return Read("one", Entry(0, "U8", (nbytes,), 0, nbytes))


@pytest.mark.parametrize(("nbytes", "is_pinned"), [(1, True), (PINNED_TO, True), (PINNED_TO + 1, False)])
@pytest.mark.parametrize("lend", [PinnedTransfer.host, PinnedTransfer.staged])
def test_tensors_of_moderate_size_are_read_to_page_locked_memory(
    device: StandInDevice, lend: Callable[[PinnedTransfer, Read], torch.Tensor | None], nbytes: int, is_pinned: bool
) -> None:
    found = lend(PinnedTransfer(), read_of(nbytes))
    assert (found is not None) == is_pinned
    assert found is None or found.nbytes == nbytes


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.int64])
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 5), (HALF // 16,)])
def test_a_lane_lends_memory_of_any_dtype_and_shape(
    device: StandInDevice, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    lane = Lane()
    for _ in range(5):
        lent = lane.lend(shape, dtype)
        assert (lent.dtype, tuple(lent.shape)) == (dtype, shape) and lent.data_ptr() % dtype.itemsize == 0
        lane.lend((1,), torch.uint8)


def test_what_is_lent_again_has_left_before(device: StandInDevice) -> None:
    one, generator = PinnedTransfer(), random.Random(0)
    sizes = [generator.randrange(HALF // 3) for _ in range(60)]
    places = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
    for number, (size, place) in enumerate(zip(sizes, places, strict=True)):
        lent = one.staged(read_of(size))
        assert lent is not None
        one.copy(place, lent.fill_(number + 1))
    one.finish()
    assert all(bool((place == number + 1).all()) for number, place in enumerate(places))


def test_few_bytes_of_a_thread_are_on_their_way_at_once_and_all_arrive_at_a_stand_in_for_a_gpu(
    device: StandInDevice,
) -> None:
    one, size = PinnedTransfer(), IN_FLIGHT // 4
    places = [torch.zeros(size, dtype=torch.uint8) for _ in range(12)]
    for number, place in enumerate(places):
        one.copy(place, torch.full((size,), number + 1, dtype=torch.uint8))
    (lane,) = device.streams
    assert lane.most <= IN_FLIGHT + size
    one.finish()
    assert [int(place[-1]) for place in places] == list(range(1, 13))


def test_each_reading_thread_has_a_stream_and_this_process_s_gpu(device: StandInDevice, tmp_path: Path) -> None:
    tensors = {f"t{number}": torch.randn(75_000 + number) for number in range(40)}
    save_file(tensors, tmp_path / "model.safetensors")
    one = PinnedTransfer()
    places = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    used = set[int]()

    def receive(name: str, tensor: torch.Tensor) -> None:
        used.add(threading.get_ident())
        one.copy(places[name], tensor)

    log = ReadLog()
    assert list(stream(open_reads(tmp_path), log, one.staged, receive, 4)) == []
    one.finish()
    assert all(torch.equal(places[name], tensor) for name, tensor in tensors.items())
    assert log.bytes_read == sum(tensor.nbytes for tensor in tensors.values())
    assert len(device.streams) == len(device.chosen) and set(device.chosen) == used
    assert set(device.chosen.values()) == {3}


@pytest.mark.parametrize("sizes", [[0], [1], [HALF], [HALF + 1], [3 * HALF + 5], [5, HALF - 5, HALF, 0, 7, HALF + 9]])
def test_hashes_of_tensors_small_and_large_are_those_of_their_bytes(device: StandInDevice, sizes: list[int]) -> None:
    tensors = {str(size): torch.randint(0, 256, (size,), dtype=torch.uint8) for size in sizes}
    tensors |= {f"float {size}": torch.randn(size // 4) for size in sizes}
    assert dict(PinnedTransfer().hashes(tensors.items())) == {name: sha256(one) for name, one in tensors.items()}


def test_a_hash_of_columns_is_their_bytes_in_row_major_order(device: StandInDevice) -> None:
    small, large = torch.randn(64, 48).bfloat16()[:, 8:24], torch.randn(HALF // 32, 48).bfloat16()[:, 8:28]
    found = dict(PinnedTransfer().hashes([("small", small), ("large", large)]))
    assert found == {"small": sha256(small), "large": sha256(large)}


def test_lanes_go_from_threads_that_read_to_threads_that_hash(device: StandInDevice) -> None:
    one = PinnedTransfer()
    for _ in range(3):
        thread = threading.Thread(target=lambda: list(one.hashes([("x", torch.zeros(9))])))
        thread.start()
        thread.join()
        one.finish()
    assert len(device.streams) == 1
    one.close()
    list(one.hashes([("x", torch.zeros(9))]))
    assert len(device.streams) == 2
