"""Reading: every planned byte once, in order, owned by the consumer; a file that shrinks is one clear error."""

from __future__ import annotations

import hashlib
import json
import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sglang_mixed.checkpoint import Entry, Read, pieces, read_entry, read_packed
from sglang_mixed.digests import sha256
from sglang_mixed.errors import TruncatedFileError
from sglang_mixed.stream import FileRead, ReadLog, stream


def _file(folder: Path) -> tuple[dict[str, torch.Tensor], list[FileRead]]:
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "a": torch.randn(7, 33, generator=generator).to(torch.bfloat16),
        "b": torch.randint(-128, 127, (5, 3), dtype=torch.int8, generator=generator),
        "scalar": torch.tensor(3.5),
        "c": torch.randn(64, 64, generator=generator).to(torch.float8_e4m3fn),
    }
    save_file(tensors, folder / "model.safetensors")
    return tensors, list(open_reads(folder))


def open_reads(folder: Path) -> Iterator[FileRead]:
    path = folder / "model.safetensors"
    header = int.from_bytes(path.read_bytes()[:8], "little")
    described = json.loads(path.read_bytes()[8 : 8 + header])
    described.pop("__metadata__", None)
    entries = [
        Read(name, Entry(0, value["dtype"], tuple(value["shape"]), *(8 + header + x for x in value["data_offsets"])))
        for name, value in described.items()
    ]
    yield "source", path, sorted(entries, key=lambda read: read.entry.begin)


@pytest.mark.parametrize("seed", range(20))
def test_pieces_packed_into_one_piece_of_memory_are_together_what_each_tensor_alone_is(
    tmp_path: Path, seed: int
) -> None:
    tensors, ((_, path, reads),) = _file(tmp_path)
    choose = random.Random(seed)
    cut = [read._replace(ranges=tuple(map(any_range(choose), read.entry.shape))) for read in reads if seed % 4]
    wanted = choose.sample([*reads, *cut], len(reads)) if seed % 3 else reads
    memory, places, end = bytearray(1 << 20), [], 0
    for read in wanted:
        places.append(end)
        end += read.nbytes + choose.randrange(3)
    with path.open("rb") as file:
        limit = 1 + seed * 50
        for read, place in zip(wanted, places, strict=True):
            parts = list(pieces(read, limit))
            assert all(piece.nbytes <= limit for piece in parts)
            read_packed(file.fileno(), path, parts, memoryview(memory), [place + piece.begin for piece in parts])
        if seed % 2:
            whole = [piece for read in wanted for piece in pieces(read, 1 << 20)]
            read_packed(file.fileno(), path, whole, memoryview(memory), places)
        for read, place in zip(wanted, places, strict=True):
            alone = read_entry(file.fileno(), path, read).reshape(-1).view(torch.uint8).numpy().tobytes()
            assert bytes(memory[place : place + read.nbytes]) == alone
            whole = tensors[read.name][tuple(slice(*bounds) for bounds in read.ranges or ())]
            assert alone == whole.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def any_range(choose: random.Random) -> Callable[[int], tuple[int, int]]:
    return lambda size: (begin := choose.randrange(size), choose.randrange(begin, size) + 1)


def test_every_tensor_arrives_with_its_bytes_and_its_hash(tmp_path: Path) -> None:
    tensors, reads = _file(tmp_path)
    log = ReadLog()
    found = dict(stream(reads, log))
    assert list(found) == [read.name for read in reads[0][2]]
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        raw = tensor.reshape(-1).view(torch.uint8)
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), raw)
        assert sha256(found[name]) == hashlib.sha256(raw.numpy()).hexdigest()
    assert log.bytes_read == sum(tensor.nbytes for tensor in tensors.values())


def test_the_bytes_are_those_the_safetensors_library_reads(tmp_path: Path) -> None:
    _, reads = _file(tmp_path)
    with safe_open(reads[0][1], "pt") as reference:
        for name, tensor in stream(reads, ReadLog()):
            assert sha256(tensor) == sha256(reference.get_tensor(name))


def test_tensors_may_be_kept(tmp_path: Path) -> None:
    _, reads = _file(tmp_path)
    kept = [tensor for _, tensor in stream(reads, ReadLog())]
    assert len({tensor.untyped_storage().data_ptr() for tensor in kept}) == len(kept)


def test_a_file_that_shrinks_while_it_is_read_names_file_and_tensor(tmp_path: Path) -> None:
    _, reads = _file(tmp_path)
    path = reads[0][1]
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(TruncatedFileError) as error:
        list(stream(reads, ReadLog()))
    assert error.value.file == str(path) and error.value.tensor == reads[0][2][-1][0]


@pytest.mark.parametrize("readers", [2, 5])
def test_at_most_one_tensor_more_than_readers_is_alive(tmp_path: Path, readers: int) -> None:
    tensors = {f"t{index:02}": torch.full((256, 1024), float(index)) for index in range(12)}
    save_file(tensors, tmp_path / "model.safetensors")
    alive: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
    peak = 0

    def destination(name: str) -> torch.Tensor:
        nonlocal peak
        tensor = torch.empty(256, 1024)
        alive.add(tensor)  # type: ignore[arg-type]
        peak = max(peak, len(alive))
        return tensor

    for _, tensor in stream(list(open_reads(tmp_path)), ReadLog(), destination, readers=readers):
        assert tensor.shape == (256, 1024)
        time.sleep(0.01)
        del tensor
    assert 2 <= peak <= readers + 1


def test_a_consumer_that_stops_early_leaves_no_thread(tmp_path: Path) -> None:
    _, reads = _file(tmp_path)
    tensors = stream(reads, ReadLog())
    next(tensors)
    tensors.close()  # type: ignore[attr-defined]
    assert not any(thread.name.startswith("weight-") for thread in threading.enumerate())
