"""A process that hashes what files hold, while this one serves."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file

from sglang_mixed.digests import sha256, sha256_tree
from sglang_mixed.errors import ProofError
from sglang_mixed.file_hashes import Request, hash_files

from .test_stream import open_reads


def write(folder: Path, number: int = 30) -> dict[str, torch.Tensor]:
    tensors = {f"layer\n{place}.weight": torch.randn(40 + place, 3).half() for place in range(number)}
    save_file(tensors, folder / "model.safetensors")
    return tensors


def test_each_planned_tensor_is_hashed_as_it_stands_in_its_file_and_as_memory_holds_it(tmp_path: Path) -> None:
    tensors = write(tmp_path)
    reads = list(open_reads(tmp_path))
    cast = "layer\n3.weight"
    found = {one.name: one for one in hash_files(Request(reads, {cast: "bfloat16"}))}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        held = tensor.bfloat16() if name == cast else tensor
        assert found[name] == (name, sha256(tensor), sha256(held), sha256_tree(held))
    assert found[cast].in_file == hashlib.sha256(tensors[cast].numpy().tobytes()).hexdigest()


def test_a_file_that_went_away_is_one_error_that_names_it(tmp_path: Path) -> None:
    write(tmp_path)
    reads = list(open_reads(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ProofError, match="second time") as caught:
        list(hash_files(Request(reads, {})))
    assert "model.safetensors" in str(caught.value)


def test_who_stops_to_read_ends_the_process(tmp_path: Path) -> None:
    write(tmp_path)
    answers = hash_files(Request(list(open_reads(tmp_path)), {}))
    next(answers)
    started = time.monotonic()
    answers.close()
    assert time.monotonic() - started < 20
    with pytest.raises(StopIteration):
        next(answers)


def test_a_process_that_was_killed_is_one_error(tmp_path: Path) -> None:
    write(tmp_path, 2000)
    answers = hash_files(Request(list(open_reads(tmp_path)), {}))
    next(answers)  # more answers are left than a pipe holds
    children = (one for one in psutil.Process().children() if one.status() != psutil.STATUS_ZOMBIE)
    (process,) = (one for one in children if "sglang_mixed.file_hashes" in one.cmdline())
    process.kill()
    with pytest.raises(ProofError, match="second time"):
        list(answers)
