"""SHA-256 of tensors' bytes in row-major order, as hexadecimal."""

from __future__ import annotations

import hashlib

import torch

#: Bytes of a tree's leaf.
LEAF = 1 << 14


def sha256(tensor: torch.Tensor) -> str:
    """Of all bytes, one after the other."""
    return hashlib.sha256(_bytes_of(tensor)).hexdigest()


def sha256_tree(tensor: torch.Tensor) -> str:
    """Of the SHA-256 of every `LEAF` bytes, the last of which may be fewer: a GPU takes all leaves at once."""
    return root(leaves_of(tensor))


def leaves_of(tensor: torch.Tensor) -> bytes:
    """A tree's leaves: SHA-256 of every `LEAF` bytes, 32 bytes each."""
    data = _bytes_of(tensor)
    pieces = (data[LEAF * number : LEAF * (number + 1)] for number in range(num_leaves(len(data))))
    return b"".join(hashlib.sha256(piece).digest() for piece in pieces)


def root(leaves: bytes) -> str:
    """What a tree's leaves come to, 32 bytes each in their order."""
    return hashlib.sha256(leaves).hexdigest()


def num_leaves(nbytes: int) -> int:
    """Of so many bytes: at least one."""
    return max(1, -(-nbytes // LEAF))


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
