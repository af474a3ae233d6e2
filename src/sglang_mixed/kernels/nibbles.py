"""The order in which torch's int4pack kernel keeps its nibbles on this CPU, read and written.

On x86 with AVX-512 rows come in tiles of 64. A tile is [in, 32] bytes; byte j holds row j in its low nibble and row
32 + j in its high one. A last narrower tile pairs neighbouring rows instead. The layout is torch's own business and may
change: `layout_is_known` proves it on this machine, and where it doesn't hold the kernel itself is asked for its codes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from ..formats.awq import ORDER, unpack_columns
from ..formats.bit_stream import unpack
from .compiled import available
from .native import pack_nibbles, unpack_nibbles
from .panels import spans

TILE = 64
#: Rows converted at once: torch wants them as int32, eight times the packed size.
ROWS_AT_ONCE = 8 * TILE


def pack_words(words: torch.Tensor, order: str, nibbles: torch.Tensor, place: torch.Tensor | None = None) -> None:
    """int32 words of a format of four bits (`order`) to nibbles uint8 [out, in/2] in torch's layout.

    Column k comes to lie where column place[k] would, int32 [in].
    """
    rows = nibbles.shape[0]
    if available() and layout_is_known():
        pack_nibbles(words.contiguous(), order, nibbles, place)
        return
    sorting = None if place is None else torch.argsort(place)
    for low, high in spans(0, rows, ROWS_AT_ONCE):
        codes = _codes(words, order, low, high)
        codes = codes if sorting is None else codes[sorting]
        nibbles[low:high] = torch._convert_weight_to_int4pack_for_cpu(codes.t().to(torch.int32).contiguous(), 1)


def unpack_words(nibbles: torch.Tensor, order: str, place: torch.Tensor | None) -> torch.Tensor:
    """The inverse: the format's words."""
    rows, columns = nibbles.shape[0], nibbles.shape[1] * 2
    along_in, along_out = {"gptq": (8, 1), "awq": (1, 8), "packed": (8, 1)}[order]
    turned = columns // along_in, rows // along_out
    words = torch.empty(turned[::-1] if order == "packed" else turned, dtype=torch.int32)
    if available() and layout_is_known():
        unpack_nibbles(nibbles, order, words, place)
        return words
    for low, high in tiles(rows):
        codes = decode_rows(nibbles, low, high)
        codes = codes if place is None else codes[place]
        if order == "awq":
            words[:, low // 8 : high // 8] = _to_words(
                codes.view(columns, -1, 8)[..., ORDER].reshape(columns, -1).t()
            ).t()
        elif order == "packed":
            words[low:high] = _to_words(codes).t()
        else:
            words[:, low:high] = _to_words(codes)
    return words


def _codes(words: torch.Tensor, order: str, low: int, high: int) -> torch.Tensor:
    """uint8 [in, rows] of the rows from low to high."""
    if order == "awq":
        return unpack_columns(words[:, low // 8 : high // 8])
    return unpack(words[low:high].t() if order == "packed" else words[:, low:high], 4)


def _to_words(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [in, n] of 0..15 -> int32 [in/8, n], lowest nibble first."""
    octets = codes[0::2] | (codes[1::2] << 4)  # [in/2, n], four to a word
    return octets.view(-1, 4, octets.shape[1]).transpose(1, 2).contiguous().view(torch.int32).squeeze(-1)


def tiles(stop: int, start: int = 0) -> Iterator[tuple[int, int]]:
    """(low, high) rows of the tiles in [start, stop), which begins with one."""
    return spans(start, stop, TILE)


def rows_of_halves(low: int, high: int) -> tuple[slice, slice]:
    """Which rows of W the low and the high nibbles of the tile [low, high) are."""
    middle = low + TILE // 2
    whole = high - low == TILE
    return (slice(low, middle, 1), slice(middle, high, 1)) if whole else (slice(low, high, 2), slice(low + 1, high, 2))


def signed_halves(nibbles: torch.Tensor, low: int, high: int) -> Iterator[torch.Tensor]:
    """16·(q - 8) as int8 [in, rows/2], of the low and then the high nibbles of one tile.

    Flipping the top bit of a nibble makes q - 8 of q in two's complement; left in the upper half of a byte it is
    16 times that, which spares the shift back.
    """
    flipped = nibbles[low:high].view(torch.int8).view(-1, (high - low) // 2).bitwise_xor(-0x78)
    yield flipped << 4
    yield flipped.bitwise_and_(-0x10)


def decode_rows(nibbles: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """The codes of one tile, uint8 [in, rows], 0..15."""
    if not layout_is_known():
        return _ask_kernel(nibbles[low:high])
    tile = nibbles[low:high].view(-1, (high - low) // 2)
    codes = torch.empty(len(tile), high - low, dtype=torch.uint8)
    first, second = rows_of_halves(0, high - low)
    codes[:, first], codes[:, second] = tile & 15, tile >> 4
    return codes


def _ask_kernel(nibbles: torch.Tensor) -> torch.Tensor:
    """The codes as the kernel's own products with one-hot rows: with scale 1 and zero 8 they are exact."""
    rows, columns = nibbles.shape[0], nibbles.shape[1] * 2
    group = next(size for size in (256, 128, 64, 32) if columns % size == 0)
    unit = torch.tensor([1.0, 8.0], dtype=torch.bfloat16).expand(columns // group, rows, 2).contiguous()
    codes = torch.empty(columns, rows, dtype=torch.uint8)
    for start, stop in spans(0, columns, 256):
        hot = torch.zeros(stop - start, columns, dtype=torch.bfloat16)
        hot[:, start:stop].fill_diagonal_(1)
        codes[start:stop] = torch._weight_int4pack_mm_for_cpu(hot, nibbles, group, unit).to(torch.uint8)
    return codes


@functools.cache
def layout_is_known() -> bool:
    """Whether torch packs a whole and a narrow tile as described above."""
    codes = torch.arange(32 * 112).mul_(7).bitwise_right_shift_(1).bitwise_and_(15).view(112, 32).to(torch.int32)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
    for low, high in tiles(112):
        tile, (first, second) = packed[low:high].view(32, -1), rows_of_halves(0, high - low)
        expected = codes[low:high].t()
        if not (torch.equal(tile & 15, expected[:, first]) and torch.equal(tile >> 4, expected[:, second])):
            return False
    return True
