"""SHA-256 as a GPU computes it, against hashlib's: the rounds in PTX, and what surrounds them interpreted."""

from __future__ import annotations

import hashlib
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from ptx import run
from sha256_rounds import hashes_of

from sglang_mixed.digests import LEAF, num_leaves, root, sha256, sha256_tree
from sglang_mixed.kernels.sha256 import COMPRESS, FIRST

#: Around where a word ends, and where a block has no room for the length.
SIZES = [*range(70), 119, 120, 127, 128, 129]


def test_the_rounds_in_ptx_are_those_of_sha256() -> None:
    data = torch.randint(0, 256, (3 * 64 - 9,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    padded = bytes(data.tolist()) + b"\x80" + (8 * len(data)).to_bytes(8, "big")
    state = list(FIRST.value)
    for begin in range(0, len(padded), 64):
        words = [int.from_bytes(padded[place : place + 4], "little") for place in range(begin, begin + 64, 4)]
        registers = {f"${8 + number}": value for number, value in enumerate([*state, *words])}
        state = run(COMPRESS.value, registers, 8)
    assert b"".join(word.to_bytes(4, "big") for word in state) == hashlib.sha256(bytes(data.tolist())).digest()


def test_pieces_of_any_size_are_hashed_with_their_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read when Triton is imported
    generator = torch.Generator().manual_seed(0)
    pieces = [torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator) for size in SIZES]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(hashes_of, pieces).result()
    assert found == [hashlib.sha256(bytes(piece.tolist())).digest() for piece in pieces]


@pytest.mark.parametrize("size", [0, 1, LEAF - 1, LEAF, LEAF + 1, 3 * LEAF])
def test_a_tree_is_the_hash_of_its_leaves_hashes(size: int) -> None:
    data = torch.randint(0, 256, (size,), dtype=torch.uint8)
    leaves = [sha256(data[begin : begin + LEAF]) for begin in range(0, max(1, size), LEAF)]
    assert len(leaves) == num_leaves(size)
    assert sha256_tree(data) == root(bytes.fromhex("".join(leaves)))
    assert size == 0 or sha256_tree(data) != sha256_tree(data.flip(0) ^ 1)
