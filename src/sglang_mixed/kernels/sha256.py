"""SHA-256 (FIPS 180-4) of many tensors at once on the GPU, each by one thread of it.

A digest cannot be shared out: every 64 bytes wait for those before. So one thread is slow, some 50 MB/s, but thousands
of experts' tensors have a thread each, and the host's processor has none of the work.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch


def can_hash(tensor: torch.Tensor) -> bool:
    """Whether `sha256_of` takes a tensor: whole words in one piece, or in rows of whole blocks of 64 bytes."""
    return tensor.numel() > 0 and _layout(tensor) is not None


def sha256_of(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """int32 [tensors, 8], the words of each tensor's digest (see `as_hexadecimal`), on the tensors' device.

    The bytes are those in row-major order. The tensors must stay as they are until the current stream comes there.
    """
    longest_first = sorted(range(len(tensors)), key=lambda number: -tensors[number].nbytes)
    lines = []
    for number in longest_first:
        layout = _layout(tensors[number])
        assert layout is not None
        lines.append([tensors[number].data_ptr(), tensors[number].nbytes // 4, *layout, number])
    from . import sha256_rounds as rounds  # the only one here that imports Triton

    device = tensors[0].device
    # From memory that is not page-locked a copy would wait for all that the stream has to do.
    table = torch.tensor(lines, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
    table = table.to(device, non_blocking=True)
    digests = torch.empty(len(tensors), 8, dtype=torch.int32, device=device)
    grid = (-(-len(tensors) // rounds.LANES),)
    rounds.digest[grid](table, digests, len(tensors), BLOCK=rounds.LANES, num_warps=1)
    return digests


def works() -> bool:
    """Whether the current GPU hashes as the host does, tried on a few bytes; the kernel is compiled or found then."""
    sample = torch.arange(5 * 48, dtype=torch.int32, device="cuda").view(5, 48)
    parts = [sample, sample[:, 16:32], sample[1]]
    expected = [hashlib.sha256(part.cpu().contiguous().numpy().tobytes()).hexdigest() for part in parts]
    return as_hexadecimal(sha256_of(parts).cpu()) == expected


def as_hexadecimal(digests: torch.Tensor) -> list[str]:
    """Of int32 [tensors, 8] on the host."""
    words = digests.numpy().astype(">u4")
    return [row.tobytes().hex() for row in words]


def _layout(tensor: torch.Tensor) -> tuple[int, int] | None:
    """Words of a row, and from one row's beginning to the next one's; None where rows are not of whole blocks."""
    if tensor.data_ptr() % 4:
        return None
    if tensor.is_contiguous():
        return None if tensor.nbytes % 4 else (tensor.nbytes // 4, 0)
    *_, stride, last = tensor.stride()
    row, step = tensor.shape[-1] * tensor.itemsize, stride * tensor.itemsize
    if tensor.squeeze().dim() != 2 or tensor.dim() != 2 or last != 1 or row % 64 or step % 4:
        return None
    return row // 4, step // 4
