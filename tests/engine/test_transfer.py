"""Bytes on their way to a GPU and back; CUDA's copies and page-locked memory are stand-ins that keep count."""

from __future__ import annotations

import random
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sglang_mixed.checkpoint import Read
from sglang_mixed.checkpoint.shard import View
from sglang_mixed.digests import LEAF, sha256_tree
from sglang_mixed.engine.loading.slabs import ALIGNMENT
from sglang_mixed.engine.loading.transfer import SLAB, SLABS, PinnedTransfer
from sglang_mixed.errors import TruncatedFileError
from sglang_mixed.formats.base import TORCH_DTYPES
from sglang_mixed.stream import FileRead, ReadLog

from ..test_stream import open_reads
from .stand_in_device import StandInDevice

BORROWED = SLABS * SLAB


class Places:
    """A receiver that has a place for some tensors and gives the others back."""

    def __init__(self, one: PinnedTransfer, tensors: dict[str, torch.Tensor], has_none: Sequence[str] = ()) -> None:
        self._transfer, self._none = one, has_none
        self.places = {name: torch.zeros_like(tensor) for name, tensor in tensors.items() if name not in has_none}
        self.order: list[str] = []
        self.checked: dict[str, torch.Tensor] = {}
        self.completes = False

    def takes(self, read: Read) -> bool:
        return read.name in self.places

    def is_only_codes(self, read: Read) -> bool:
        return read.entry.dtype == "F8_E4M3"

    def check(self, name: str, tensor: torch.Tensor) -> None:
        self.checked[name] = tensor.clone()

    def destination(self, read: Read) -> torch.Tensor | None:
        return self._transfer.memory(read.shape, TORCH_DTYPES[read.entry.dtype])

    def deliver(self, name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        self.order.append(name)
        if name not in self.places:
            return tensor
        self._transfer.copy(self.places[name], tensor)
        if self.completes:
            self._transfer.complete(name, self.places[name])
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


def test_small_tensors_arrive_at_a_stand_in_for_a_gpu_in_few_calls_from_one_thread(
    device: StandInDevice, tmp_path: Path
) -> None:
    choose = random.Random(0)
    tensors = of_sizes(*(choose.randrange(SLAB // 25) for _ in range(300)))
    reads, one, log = write(tmp_path, **tensors), PinnedTransfer(), ReadLog()
    receiver = Places(one, tensors)
    assert list(one.stream(reads, log, receiver)) == []
    assert all(torch.equal(receiver.places[name], tensor) for name, tensor in tensors.items())
    assert receiver.order == [read.name for read in reads[0][2]]
    assert log.bytes_read == sum(tensor.nbytes for tensor in tensors.values())
    assert device.callers == {threading.get_ident()} and device.calls < 10
    assert device.pinned == BORROWED


def test_what_has_no_place_is_given_on_in_memory_of_its_own(device: StandInDevice, tmp_path: Path) -> None:
    tensors = of_sizes(5, SLAB // 2, 0, *[SLAB // 2] * 30, 9, SLAB, SLAB + 1)
    reads, one = write(tmp_path, **tensors), PinnedTransfer()
    receiver = Places(one, tensors, has_none=list(tensors)[::3])
    given = dict(one.stream(reads, ReadLog(), receiver))
    assert given.keys() == set(list(tensors)[::3])
    assert sum(tensor.nbytes for tensor in tensors.values()) > device.pinned, "slabs are filled more than once"
    assert all(torch.equal(one, tensors[name]) for name, one in {**given, **receiver.places}.items())


@pytest.mark.parametrize("has_places", [True, False])
def test_tensors_larger_than_a_slab_arrive_in_pieces(device: StandInDevice, tmp_path: Path, has_places: bool) -> None:
    tensors = of_sizes(3, SLAB + 3, 2 * SLAB, 5, 3 * SLAB - 1, SLAB, 7)
    reads, one = write(tmp_path, **tensors), PinnedTransfer()
    receiver = Places(one, tensors, has_none=() if has_places else list(tensors))
    given = dict(one.stream(reads, ReadLog(), receiver))
    found = receiver.places if has_places else given
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert receiver.checked.keys() == tensors.keys()
    assert device.pinned == BORROWED


def test_rows_and_columns_of_a_large_tensor_arrive_where_they_belong(device: StandInDevice, tmp_path: Path) -> None:
    tensor = torch.arange(3 * SLAB // 4, dtype=torch.int32).view(-1, 1024)
    ((source, path, (read,)),) = write(tmp_path, whole=tensor)
    parts = {"rows": ((5, len(tensor) - 3), (0, 1024)), "columns": ((0, len(tensor)), (100, 1000))}
    reads = [read._replace(name=name, ranges=ranges) for name, ranges in parts.items()]
    expected = {name: tensor[tuple(slice(*bounds) for bounds in ranges)].clone() for name, ranges in parts.items()}
    one = PinnedTransfer()
    receiver = Places(one, expected)
    receiver.places["columns"] = torch.zeros(len(tensor), 2048, dtype=torch.int32)[:, 64:964]
    assert list(one.stream([(source, path, reads)], ReadLog(), receiver)) == []
    assert all(torch.equal(receiver.places[name], part) for name, part in expected.items())


def test_tensors_that_lie_in_turns_in_a_matrix_arrive(device: StandInDevice, tmp_path: Path) -> None:
    matrix = torch.randint(-9, 9, (8, 6), dtype=torch.int32)
    ((source, path, (read,)),) = write(tmp_path, matrix=matrix)
    expected = {"even": matrix[0::2], "odd": matrix[1::2], "transposed": matrix.T, "low": matrix[:4]}
    views = {
        "even": View("even", (8, 6), False, 0, 2),
        "odd": View("odd", (8, 6), False, 1, 2),
        "transposed": View("transposed", (8, 6), True, 0, 1),
        "low": View("low", (8, 6), False, 0, 1),
    }
    reads = [
        Read(name, read.entry._replace(shape=tuple(expected[name].shape), view=view)) for name, view in views.items()
    ]
    one = PinnedTransfer()
    receiver = Places(one, expected, has_none=("odd", "low"))
    given = dict(one.stream([(source, path, reads)], ReadLog(), receiver))
    assert given.keys() == {"odd", "low"}
    assert all(torch.equal(found, expected[name]) for name, found in {**given, **receiver.places}.items())


class Regions(Places):
    """A receiver that gives back whole tensors, of which only a region was read."""

    def __init__(self, one: PinnedTransfer, wholes: dict[str, torch.Tensor]) -> None:
        super().__init__(one, wholes, has_none=list(wholes))
        self.wholes = {name: torch.zeros_like(whole) for name, whole in wholes.items()}

    def destination(self, read: Read) -> torch.Tensor | None:
        return self.wholes[read.name][tuple(slice(*bounds) for bounds in read.ranges or ())]

    def deliver(self, name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        return self.wholes[name]


@pytest.mark.parametrize("rows", [40, 3 * SLAB // 4096])
def test_a_rank_s_columns_are_read_into_the_whole_tensor_that_others_cut(
    device: StandInDevice, tmp_path: Path, rows: int
) -> None:
    whole = torch.randint(-9, 9, (rows, 1024), dtype=torch.int32)
    ((source, path, (read,)),) = write(tmp_path, whole=whole)
    one, reads = PinnedTransfer(), [read._replace(ranges=((0, rows), (512, 1024)))]
    given = dict(one.stream([(source, path, reads)], ReadLog(), Regions(one, {"whole": whole})))
    assert torch.equal(given["whole"][:, 512:], whole[:, 512:]) and not given["whole"][:, :512].any()


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


@pytest.mark.parametrize("sizes", [[0], [1], [LEAF], [LEAF + 1], [3 * LEAF + 5], [5, LEAF - 5, LEAF, 0, 7, LEAF + 9]])
def test_hashes_of_tensors_small_and_large_are_those_of_their_bytes(device: StandInDevice, sizes: list[int]) -> None:
    tensors = {str(size): torch.randint(0, 256, (size,), dtype=torch.uint8) for size in sizes}
    tensors |= {f"float {size}": torch.randn(size // 4) for size in sizes}
    assert hashes_of(tensors) == {name: sha256_tree(one) for name, one in tensors.items()}


def hashes_of(tensors: dict[str, torch.Tensor]) -> Mapping[str, str]:
    one = PinnedTransfer()
    assert list(one.stream([], ReadLog(), Places(one, {}))) == []
    return one.hashes(tensors.items())


def test_a_tensor_that_is_complete_is_hashed_once(device: StandInDevice, tmp_path: Path) -> None:
    tensors = of_sizes(*[SLAB // 3] * 30, SLAB + 5, 7)
    reads, one = write(tmp_path, **tensors), PinnedTransfer()
    receiver = Places(one, tensors)
    receiver.completes = True
    assert list(one.stream(reads, ReadLog(), receiver)) == []
    places = {name: place.clone() for name, place in receiver.places.items()}
    receiver.places["t0"].zero_()
    later = {"later": torch.arange(9)}
    assert one.completed == places.keys()
    assert one.hashes(later.items()) == {name: sha256_tree(tensor) for name, tensor in (places | later).items()}


def test_a_hash_of_columns_is_their_bytes_in_row_major_order(device: StandInDevice) -> None:
    small, large = torch.randn(64, 48).bfloat16()[:, 8:24], torch.randn(LEAF, 48).bfloat16()[:, 8:28]
    assert hashes_of({"small": small, "large": large}) == {"small": sha256_tree(small), "large": sha256_tree(large)}


def test_fp8_codes_that_are_no_numbers_are_found_by_looking_at_their_batch_on_the_gpu(
    device: StandInDevice, tmp_path: Path
) -> None:
    every = torch.tensor([code for code in range(256) if code not in (0x7F, 0xFF)], dtype=torch.uint8)
    clean = {"clean": every.view(torch.float8_e4m3fn), "scale": torch.ones(3), "other": torch.tensor(float("nan"))}
    one = PinnedTransfer()
    receiver = Places(one, clean)
    assert list(one.stream(write(tmp_path, **clean), ReadLog(), receiver)) == []
    assert receiver.checked.keys() == {"scale", "other"}
    for code in (0x7F, 0xFF):
        wrong = every.repeat(SLAB // 100)
        wrong[-1] = code
        tensors = {**clean, "wrong": wrong.view(torch.float8_e4m3fn)}
        receiver = Places(one, tensors)
        assert list(one.stream(write(tmp_path, **tensors), ReadLog(), receiver)) == []
        assert torch.equal(receiver.checked["wrong"].view(torch.uint8), wrong)


def test_tensors_of_several_dtypes_arrive_at_places_that_are_rows_columns_or_wider(
    device: StandInDevice, tmp_path: Path
) -> None:
    tensors = {
        "rows": torch.randn(16, 8),
        "columns": torch.randint(-9, 9, (16, 8), dtype=torch.int32),
        "other columns": torch.randint(-9, 9, (16, 8), dtype=torch.int32),
        "wider": torch.randn(16, 8).bfloat16(),
        "scalar": torch.tensor(3.0),
    }
    one = PinnedTransfer()
    receiver = Places(one, tensors)
    stacked = torch.zeros(16, 24, dtype=torch.int32)
    receiver.places |= {"columns": stacked[:, :8], "other columns": stacked[:, 16:], "wider": torch.zeros(16, 8)}
    assert list(one.stream(write(tmp_path, **tensors), ReadLog(), receiver)) == []
    assert all(torch.equal(receiver.places[name], tensor.to(receiver.places[name])) for name, tensor in tensors.items())
    assert not stacked[:, 8:16].any()


def test_hashes_of_tensors_in_turns_in_their_parameters_are_those_of_their_bytes(device: StandInDevice) -> None:
    parameters = [torch.randn(5, 64, 48).bfloat16(), torch.randint(-9, 9, (3, LEAF // 512, 128), dtype=torch.int32)]
    tensors = {
        f"{number} {matrix} {begin}": one[matrix, :, begin : begin + 16]
        for number, one in enumerate(parameters)
        for matrix in range(len(one))
        for begin in (0, 16, 32)
    }
    assert hashes_of(tensors) == {name: sha256_tree(tensor) for name, tensor in tensors.items()}
