"""Weights as the functions of c/ take them: products and decoded rows of 8 and 4 bits, packing, a search for NaN."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from .compiled import Int, Long, Pointer, available, run
from .panels import linear_by_panels, spans

#: Rows of x that one call takes; the C source has the same.
MAX_ROWS = 32
#: Kinds of 8-bit weights.
FP8, INT8 = 0, 1
FLOAT_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
#: Formats whose 4-bit words can be packed.
WORD_ORDERS = {"gptq": 0, "awq": 1, "packed": 2}
TILE, DEPTH, BLOCK, LANES = 64, 32, 4, 16
#: Decoded weights of a GEMM, in the second-level cache.
PANEL_BYTES = 2 << 20


class _Octets(ctypes.Structure):
    _fields_ = [
        *((name, Pointer) for name in ("codes", "scales")),
        *((name, Long) for name in ("out", "in", "height", "width")),
        *((name, Int) for name in ("kind", "type", "inverse")),
    ]


class _Nibbles(ctypes.Structure):
    _fields_ = [
        *((name, Pointer) for name in ("codes", "scales", "zeros")),
        *((name, Long) for name in ("out", "in", "size")),
        ("type", Int),
        ("offset", ctypes.c_float),
    ]


class _Product(ctypes.Structure):
    _fields_ = [
        *((name, Pointer) for name in ("weight", "x", "y")),
        ("rows", Long),
        *((name, Int) for name in ("x_type", "y_type")),
    ]


class _Decoding(ctypes.Structure):
    _fields_ = [
        *((name, Pointer) for name in ("weight", "target")),
        *((name, Long) for name in ("first", "stride")),
        ("scaled", Int),
    ]


class _Turning(ctypes.Structure):
    _fields_ = [
        *((name, Pointer) for name in ("source", "to")),
        *((name, Long) for name in ("rows", "columns", "mask")),
    ]


class _Packing(ctypes.Structure):
    _fields_ = [
        *((name, Pointer) for name in ("words", "tiles", "place")),
        *((name, Long) for name in ("out", "in")),
        ("order", Int),
    ]


def takes(x: torch.Tensor) -> bool:
    """Whether to run x [rows, in] here: bf16, or few rows of any dtype."""
    return x.shape[0] > 0 and (x.dtype == torch.bfloat16 or x.shape[0] <= MAX_ROWS) and available()


@dataclass(frozen=True, slots=True)
class Octets:
    """An 8-bit weight [out, in] in the file's layout, with scales in blocks of height x width.

    `scales` has ceil(out / height) x ceil(in / width) values in rows; with `inverse` they are 1 / scale.
    """

    kind: int
    weight: torch.Tensor
    scales: torch.Tensor
    height: int
    width: int
    inverse: bool = False

    def __post_init__(self) -> None:
        (out, columns), height, width = self.weight.shape, self.height, self.width
        fits = self.kind in (FP8, INT8) and self.weight.is_contiguous() and self.weight.itemsize == 1
        fits = fits and height > 0 < width and self.scales.numel() == -(-out // height) * -(-columns // width)
        fits = fits and self.scales.is_contiguous() and self.scales.dtype in FLOAT_TYPES
        assert fits, "weight and scales must be contiguous and of one shape"

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, in] -> [rows, out] in x's dtype."""
        (out, columns), rows = self.weight.shape, x.shape[0]
        assert rows > 0 and x.shape[1] == columns
        if rows <= MAX_ROWS:
            return _product("octets_product", self._struct(), x, out, BLOCK)
        height = max(1, PANEL_BYTES // (2 * columns))
        scaled = self.width < columns
        y = linear_by_panels(x, (out, columns), lambda low, _, panel: self.decode(panel, low, scaled), height)
        return y if scaled else y.float().mul_(self._row_scales()).to(x.dtype)

    def decode(self, target: torch.Tensor, start: int, scaled: bool = True) -> None:
        """Rows from `start` on to `target` bf16 [some rows, in]."""
        (out, columns), stop = self.weight.shape, start + len(target)
        assert start >= 0 and stop <= out and target.shape[1] == columns
        assert target.is_contiguous() and target.dtype == torch.bfloat16
        weight = self._struct()
        job = _Decoding(ctypes.addressof(weight), target.data_ptr(), start, columns, scaled)
        run("octets_decode", ctypes.byref(job), start, stop, BLOCK, columns)

    def _row_scales(self) -> torch.Tensor:
        scales = self.scales.float().reshape(-1)
        scales = scales if self.height == 1 else scales.repeat_interleave(self.height)[: len(self.weight)]
        return scales.reciprocal() if self.inverse else scales

    def _struct(self) -> _Octets:
        type_ = FLOAT_TYPES[self.scales.dtype]
        addresses = self.weight.data_ptr(), self.scales.data_ptr()
        return _Octets(*addresses, *self.weight.shape, self.height, self.width, self.kind, type_, self.inverse)


@dataclass(frozen=True, slots=True)
class Nibbles:
    """A 4-bit weight [out, in] in torch's layout; scales [groups, out], zero points packed or all 8."""

    nibbles: torch.Tensor
    scales: torch.Tensor
    qzeros: torch.Tensor | None
    zero_offset: int

    def __post_init__(self) -> None:
        out, columns = self.shape
        groups = self.scales.shape[0]
        fits = self.scales.shape == (groups, out) and columns % groups == 0 and columns // groups % DEPTH == 0
        fits = fits and self.scales.dtype in FLOAT_TYPES and out % 16 == 0 and self.nibbles.itemsize == 1
        fits = fits and all(one.is_contiguous() for one in (self.nibbles, self.scales))
        if self.qzeros is not None:
            fits = fits and self.qzeros.is_contiguous() and self.qzeros.nbytes == groups * out // 2
        assert fits, "nibbles, scales and zero points must be of one contiguous weight"

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""
        return self.nibbles.shape[0], self.nibbles.shape[1] * 2

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, in] -> [rows, out] in x's dtype."""
        (out, columns), rows = self.shape, x.shape[0]
        assert rows > 0 and x.shape[1] == columns
        if rows <= MAX_ROWS:
            return _product("nibbles_product", self._struct(), x, out, TILE)
        width = max(1, PANEL_BYTES // (2 * columns * TILE)) * TILE
        panel, y = torch.empty(columns * min(width, out), dtype=torch.bfloat16), x.new_empty(rows, out)
        for start, stop in spans(0, out, width):
            part = panel[: columns * (stop - start)].view(columns, -1)
            self.decode(part, start)
            y[:, start:stop] = x @ part
        return y

    def decode(self, target: torch.Tensor, start: int) -> None:
        """Rows from `start`, whole tiles of them, to `target` bf16 [in, some rows], which is Wᵀ."""
        (out, columns), stop = self.shape, start + target.shape[1]
        assert start >= 0 and stop <= out and start % TILE == 0 and (stop % TILE == 0 or stop == out)
        assert target.is_contiguous() and target.dtype == torch.bfloat16 and len(target) == columns
        weight = self._struct()
        job = _Decoding(ctypes.addressof(weight), target.data_ptr(), start, stop - start, True)
        run("nibbles_decode", ctypes.byref(job), start, stop, TILE, columns)

    def _struct(self) -> _Nibbles:
        (out, columns), zeros = self.shape, None if self.qzeros is None else self.qzeros.data_ptr()
        addresses, size = (self.nibbles.data_ptr(), self.scales.data_ptr(), zeros), columns // self.scales.shape[0]
        return _Nibbles(*addresses, out, columns, size, FLOAT_TYPES[self.scales.dtype], self.zero_offset)


def _product(name: str, weight: ctypes.Structure, x: torch.Tensor, out: int, unit: int) -> torch.Tensor:
    x, (rows, columns) = x.contiguous(), x.shape
    # C writes bf16 or float32.
    y = torch.empty(rows, out, dtype=x.dtype if x.dtype == torch.bfloat16 else torch.float32)
    addresses = ctypes.addressof(weight), x.data_ptr(), y.data_ptr()
    job = _Product(*addresses, rows, FLOAT_TYPES[x.dtype], FLOAT_TYPES[y.dtype])
    if run(name, ctypes.byref(job), 0, out, unit, columns):
        raise MemoryError(f"no memory for {rows} rows of {columns} values")
    return y if y.dtype == x.dtype else y.to(x.dtype)


def pack_nibbles(words: torch.Tensor, order: str, nibbles: torch.Tensor, place: torch.Tensor | None) -> None:
    """A format's int32 words to nibbles uint8 [out, in/2] in torch's layout.

    `order` names the format; column k comes to lie where column place[k] would, int32 [in].
    """
    _pack("nibbles_pack", words, nibbles, order, place)


def unpack_nibbles(nibbles: torch.Tensor, order: str, words: torch.Tensor, place: torch.Tensor | None) -> None:
    """The inverse, to `words`."""
    _pack("nibbles_unpack", words, nibbles, order, place)


def turn_words(words: torch.Tensor, mask: int, turned: torch.Tensor) -> None:
    """int32 [rows, columns] to `turned` [columns, rows], each word exclusive-or `mask`."""
    rows, columns = words.shape
    assert words.is_contiguous() and turned.is_contiguous() and words.dtype == turned.dtype == torch.int32
    assert turned.shape == (columns, rows)
    job = _Turning(words.data_ptr(), turned.data_ptr(), rows, columns, mask)
    run("words_turn", ctypes.byref(job), 0, columns, LANES, rows)


def has_nan(codes: torch.Tensor) -> bool:
    """Whether an e4m3 matrix has a NaN code."""
    assert codes.is_contiguous() and codes.itemsize == 1
    return run("find_nan", codes.data_ptr(), 0, codes.numel(), 1, 1)


def _pack(name: str, words: torch.Tensor, nibbles: torch.Tensor, order: str, place: torch.Tensor | None) -> None:
    out, columns = nibbles.shape[0], nibbles.shape[1] * 2
    assert words.nbytes == nibbles.nbytes == out * columns // 2 and out % 16 == 0 and columns % 8 == 0
    assert words.is_contiguous() and nibbles.is_contiguous()
    assert place is None or (place.dtype == torch.int32 and place.is_contiguous() and len(place) == columns)
    addresses = words.data_ptr(), nibbles.data_ptr(), None if place is None else place.data_ptr()
    job = _Packing(*addresses, out, columns, WORD_ORDERS[order])
    run(name, ctypes.byref(job), 0, out, TILE, columns)
