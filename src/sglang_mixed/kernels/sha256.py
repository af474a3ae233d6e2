"""Triton: SHA-256 (FIPS 180-4) of many pieces of a GPU's memory at once, a lane each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import triton
import triton.language as tl


def _primes() -> Iterator[int]:
    return (one for one in itertools.count(2) if all(one % other for other in range(2, math.isqrt(one) + 1)))


def _fraction_of_root(prime: int, degree: int) -> int:
    """The first 32 bits after the point, by bisection."""
    low, high = 0, prime << 32
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if middle**degree <= prime << 32 * degree else (low, middle)
    return low & 0xFFFFFFFF


#: K of the 64 rounds (section 4.2.2) and H(0) (5.3.3): of roots of the first primes.
ROUNDS = [_fraction_of_root(prime, 3) for prime in itertools.islice(_primes(), 64)]
FIRST = tl.constexpr(tuple(_fraction_of_root(prime, 2) for prime in itertools.islice(_primes(), 8)))


def _compress_asm() -> tl.constexpr:
    """PTX for one block: $0 to $7 are the hash after it, $8 to $15 the one before, $16 to $31 the block as stored.

    As Triton's own operators 64 rounds take longer to compile than a model to load.
    """
    names = list("abcdefgh")
    lines = ["{", ".reg .b32 w<16>, a, b, c, d, e, f, g, h, s, t, u, v;"]
    lines += [f"mov.b32 {name}, ${8 + number};" for number, name in enumerate(names)]
    lines += [f"prmt.b32 w{number}, ${16 + number}, 0, 0x0123;" for number in range(16)]

    def sigma(target: str, word: str, *turns: int, shift: int = 0) -> list[str]:
        """Exclusive or of a word turned right by each number of bits, or shifted."""
        turned = [f"shf.r.wrap.b32 {name}, {word}, {word}, {turn};" for name, turn in zip("tuv", turns, strict=False)]
        shifted = [f"shr.u32 v, {word}, {shift};"] if shift else []
        return [*turned, *shifted, f"lop3.b32 {target}, t, u, v, 0x96;"]

    for number in range(64):
        a, b, c, d, e, f, g, h = names
        word = f"w{number % 16}"
        if number >= 16:
            lines += sigma("s", f"w{(number + 1) % 16}", 7, 18, shift=3)
            lines += [f"add.u32 {word}, {word}, s;", f"add.u32 {word}, {word}, w{(number + 9) % 16};"]
            lines += [*sigma("s", f"w{(number + 14) % 16}", 17, 19, shift=10), f"add.u32 {word}, {word}, s;"]
        lines += [f"add.u32 {h}, {h}, {word};", f"add.u32 {h}, {h}, {ROUNDS[number]:#x};"]
        lines += [f"lop3.b32 s, {e}, {f}, {g}, 0xCA;", f"add.u32 {h}, {h}, s;"]  # Ch
        lines += [*sigma("s", e, 6, 11, 25), f"add.u32 {h}, {h}, s;", f"add.u32 {d}, {d}, {h};"]
        lines += [f"lop3.b32 s, {a}, {b}, {c}, 0xE8;", f"add.u32 {h}, {h}, s;"]  # Maj
        lines += [*sigma("s", a, 2, 13, 22), f"add.u32 {h}, {h}, s;"]
        names = [h, *names[:7]]
    lines += [f"add.u32 {name}, {name}, ${8 + number};" for number, name in enumerate(names)]
    lines += [f"mov.b32 ${number}, {name};" for number, name in enumerate(names)]
    return tl.constexpr("\n".join([*lines, "}"]))


COMPRESS = _compress_asm()
CONSTRAINTS = tl.constexpr(",".join(["=r"] * 8 + ["r"] * 24))
HASH = tl.constexpr((tl.uint32,) * 8)


@triton.jit
def hash_pieces(pieces, digests, num_pieces, LANES: tl.constexpr):
    """digests uint32 [pieces, 8], in memory 32 bytes each: of `pieces` int64 [pieces, (address of a word, bytes)]."""
    lanes = tl.program_id(0) * LANES + tl.arange(0, LANES)
    is_piece = lanes < num_pieces
    words = tl.load(pieces + 2 * lanes, is_piece, 0).to(tl.pointer_type(tl.uint32))
    nbytes = tl.load(pieces + 2 * lanes + 1, is_piece, 0).to(tl.int32)
    blocks = (nbytes + 8) // 64 + 1
    length = _swapped(nbytes.to(tl.uint32) * 8)
    state = (tl.zeros((LANES,), tl.uint32) + FIRST[0],)
    for number in tl.static_range(1, 8):
        state += (tl.zeros((LANES,), tl.uint32) + FIRST[number],)  # type: ignore[assignment]
    for block in range(tl.max(blocks)):
        own = (_word(words, nbytes, block, is_piece, 0),)
        for number in tl.static_range(1, 15):
            own += (_word(words, nbytes, block, is_piece, number),)  # type: ignore[assignment]
        last = _word(words, nbytes, block, is_piece, 15)
        own += (tl.where(block == blocks - 1, length, last),)  # type: ignore[assignment]
        following = compress(state, own)
        kept = (tl.where(block < blocks, following[0], state[0]),)
        for number in tl.static_range(1, 8):
            kept += (tl.where(block < blocks, following[number], state[number]),)  # type: ignore[assignment]
        state = kept
    for number in tl.static_range(8):
        tl.store(digests + lanes * 8 + number, _swapped(state[number]), is_piece)


@triton.jit
def compress(state, block):
    """The hash after a block: 8 words, of 8 and of 16 as they are stored."""
    return tl.inline_asm_elementwise(COMPRESS, CONSTRAINTS, state + block, HASH, is_pure=True, pack=1)


@triton.jit
def _word(words, nbytes, block, is_piece, NUMBER: tl.constexpr):
    """A block's word as it is stored; after the last byte follows a bit, and then nothing."""
    left = nbytes - (block * 64 + 4 * NUMBER)
    word = tl.load(words + block * 16 + NUMBER, is_piece & (left > 0), 0)
    bits = (tl.minimum(tl.maximum(left, 0), 3) * 8).to(tl.uint32)
    one = tl.full(bits.shape, 1, tl.uint32)
    marked = (word & ((one << bits) - 1)) | (one << (bits + 7))
    return tl.where(left >= 4, word, tl.where(left >= 0, marked, 0))


@triton.jit
def _swapped(word):
    return (word << 24) | ((word & 0xFF00) << 8) | ((word >> 8) & 0xFF00) | (word >> 24)
