"""SHA-256's rounds in Triton's own operators, which its interpreter runs in place of PTX."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_mixed.kernels import sha256

ROUNDS = tl.constexpr(tuple(sha256.ROUNDS))


@triton.jit
def turned(word, BITS: tl.constexpr):
    return (word >> BITS) | (word << (32 - BITS))


@triton.jit
def swapped(word):
    return (word << 24) | ((word & 0xFF00) << 8) | ((word >> 8) & 0xFF00) | (word >> 24)


@triton.jit
def compress(state, block):
    a, b, c, d, e, f, g, h = state
    words = (swapped(block[0]),)
    for number in tl.static_range(1, 16):
        words += (swapped(block[number]),)
    for number in tl.static_range(64):
        if number >= 16:
            first = turned(words[1], 7) ^ turned(words[1], 18) ^ (words[1] >> 3)
            second = turned(words[14], 17) ^ turned(words[14], 19) ^ (words[14] >> 10)
            words = words[1:] + (words[0] + first + words[9] + second,)  # noqa: RUF005
        one = h + (turned(e, 6) ^ turned(e, 11) ^ turned(e, 25)) + (g ^ (e & (f ^ g)))
        one += ROUNDS[number] + words[min(number, 15)]
        other = (turned(a, 2) ^ turned(a, 13) ^ turned(a, 22)) + ((a & b) | (c & (a | b)))
        a, b, c, d, e, f, g, h = one + other, a, b, c, d + one, e, f, g
    return (
        state[0] + a, state[1] + b, state[2] + c, state[3] + d, state[4] + e, state[5] + f, state[6] + g, state[7] + h,
    )  # fmt: skip


def hashes_of(pieces: list[torch.Tensor]) -> list[bytes]:
    """By the kernel, in a process where Triton interprets."""
    setattr(sha256, "compress", compress)  # noqa: B010
    followed = [torch.cat([piece, torch.full((8,), 0xA5, dtype=torch.uint8)]) for piece in pieces]
    table = torch.tensor([(more.data_ptr(), len(piece)) for more, piece in zip(followed, pieces, strict=True)])
    digests = torch.zeros(len(pieces), 8, dtype=torch.uint32)
    sha256.hash_pieces[(-(-len(pieces) // 16),)](table, digests, len(pieces), LANES=16)
    return list(map(bytes, digests.view(torch.uint8).tolist()))
