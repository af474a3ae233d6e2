"""Triton: the rounds of SHA-256, of as many tensors side by side as a program has threads."""

from __future__ import annotations

import math

import triton
import triton.language as tl

#: Threads of a program, which walk as many tensors.
LANES = 32
#: Fields of a line of the table: address, 32-bit words, words of a row, words from one row's beginning to the next
#: one's, and the digest's place.
ADDRESS, WORDS, ROW, STRIDE, PLACE, FIELDS = (tl.constexpr(number) for number in range(6))


def _fractions(degree: int, count: int) -> tuple[int, ...]:
    """First 32 bits of the fractional parts of the roots of the first primes."""
    primes = [n for n in range(2, 312) if all(n % d for d in range(2, math.isqrt(n) + 1))]
    return tuple(int(prime ** (1 / degree) % 1 * 2**32) for prime in primes[:count])


_K = tl.constexpr(_fractions(3, 64))
_H = tl.constexpr(_fractions(2, 8))


@triton.jit(do_not_specialize=("number",))
def digest(table, output, number, BLOCK: tl.constexpr):
    """output int32 [number, 8]: the words of a digest for each line of the table, int64 [number, FIELDS]."""
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_lane = lanes < number
    line = table + lanes * FIELDS
    address = tl.load(line + ADDRESS, is_lane, 0)
    words = tl.load(line + WORDS, is_lane, -3).to(tl.int32)
    row = tl.load(line + ROW, is_lane, 1).to(tl.int32)
    stride = tl.load(line + STRIDE, is_lane, 0)
    blocks = (words + 2) // 16 + 1  # the message, a bit, and its length in two words
    state = _start(lanes)
    following = _message(address, words, row, stride, blocks, 0)
    for block in range(tl.max(tl.where(is_lane, blocks, 0))):
        message = following
        following = _message(address, words, row, stride, blocks, block + 1)
        found = state
        for step in tl.static_range(64):
            found = _round(found, message[0] + _K[step])
            message = _extend(message)
        state = _add(state, found, block < blocks)
    place = output + tl.load(line + PLACE, is_lane, 0) * 8
    for word in tl.static_range(8):
        tl.store(place + word, state[word].to(tl.int32, bitcast=True), is_lane)


@triton.jit
def _start(lanes):
    none = tl.zeros(lanes.shape, tl.uint32)
    return (
        none + _H[0], none + _H[1], none + _H[2], none + _H[3],
        none + _H[4], none + _H[5], none + _H[6], none + _H[7],
    )  # fmt: skip


@triton.jit
def _message(address, words, row, stride, blocks, block):
    """The 16 words of each lane's block, big-endian, with what ends a message."""
    first = block * 16
    base = address + ((first // row) * stride + first % row) * 4
    left = words - first
    is_last = block == blocks - 1
    return (
        _word(base, left, 0), _word(base, left, 1), _word(base, left, 2), _word(base, left, 3),
        _word(base, left, 4), _word(base, left, 5), _word(base, left, 6), _word(base, left, 7),
        _word(base, left, 8), _word(base, left, 9), _word(base, left, 10), _word(base, left, 11),
        _word(base, left, 12), _word(base, left, 13),
        tl.where(is_last, words.to(tl.uint32) >> 27, _word(base, left, 14)),
        tl.where(is_last, words.to(tl.uint32) << 5, _word(base, left, 15)),
    )  # fmt: skip


@triton.jit
def _word(base, left, NUMBER: tl.constexpr):
    x = tl.load((base + 4 * NUMBER).to(tl.pointer_type(tl.uint32)), left > NUMBER, 0)
    x = (x << 24) | ((x & 0xFF00) << 8) | ((x >> 8) & 0xFF00) | (x >> 24)
    return tl.where(left == NUMBER, 0x80000000, x)


@triton.jit
def _round(s, word):
    a, b, c, d, e, f, g, h = s
    first = h + (_rotated(e, 6) ^ _rotated(e, 11) ^ _rotated(e, 25)) + (g ^ (e & (f ^ g))) + word
    second = (_rotated(a, 2) ^ _rotated(a, 13) ^ _rotated(a, 22)) + ((a & b) ^ (a & c) ^ (b & c))
    return (first + second, a, b, c, d + first, e, f, g)


@triton.jit
def _extend(w):
    """The words of the steps after the first of these."""
    near = _rotated(w[14], 17) ^ _rotated(w[14], 19) ^ (w[14] >> 10)
    far = _rotated(w[1], 7) ^ _rotated(w[1], 18) ^ (w[1] >> 3)
    word = w[0] + far + w[9] + near
    return (w[1], w[2], w[3], w[4], w[5], w[6], w[7], w[8], w[9], w[10], w[11], w[12], w[13], w[14], w[15], word)


@triton.jit
def _rotated(x, BITS: tl.constexpr):
    return (x >> BITS) | (x << (32 - BITS))


@triton.jit
def _add(s, t, is_block):
    return (
        tl.where(is_block, s[0] + t[0], s[0]), tl.where(is_block, s[1] + t[1], s[1]),
        tl.where(is_block, s[2] + t[2], s[2]), tl.where(is_block, s[3] + t[3], s[3]),
        tl.where(is_block, s[4] + t[4], s[4]), tl.where(is_block, s[5] + t[5], s[5]),
        tl.where(is_block, s[6] + t[6], s[6]), tl.where(is_block, s[7] + t[7], s[7]),
    )  # fmt: skip
