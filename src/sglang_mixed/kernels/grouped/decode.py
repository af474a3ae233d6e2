"""Triton: weights as they come out of memory, one compiled branch a codec.

Values are as they are stored, codes less their middle: e4m3 and whole numbers of 8 bits are exact in BF16 and FP16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import codec as codecs
from .ptx import (
    E4M3_BF16,
    E4M3_CONSTRAINTS,
    E4M3_FP16,
    FIELDS_BF16,
    FIELDS_CONSTRAINTS,
    FIELDS_FP16,
    OCTETS_BF16,
    OCTETS_CONSTRAINTS,
    OCTETS_FP16,
)

PLAIN = tl.constexpr(codecs.PLAIN)
FP8 = tl.constexpr(codecs.FP8)
INT8 = tl.constexpr(codecs.INT8)
CODES = tl.constexpr(codecs.CODES)
E2M1 = tl.constexpr(codecs.E2M1)
ALL = tl.constexpr(codecs.ALL)

#: What a line of a table of weights says (see `table.py`): the codec's number, then addresses.
CODEC = tl.constexpr(0)
WEIGHT = tl.constexpr(1)
SCALE = tl.constexpr(2)
ZERO = tl.constexpr(3)
FACTOR = tl.constexpr(4)
ORDER = tl.constexpr(5)
GROUPS = tl.constexpr(6)
BIAS = tl.constexpr(7)
FIELDS = tl.constexpr(8)

#: 2**23 in float32, and its bits: the mantissa's lowest bits count ones.
MAGIC = tl.constexpr(8388608)
MAGIC_BITS = tl.constexpr(0x4B000000)
#: What a code's exponent lacks in float32.
E4M3_FACTOR = tl.constexpr(2.0**120)


@triton.jit
def read_values(x, lines, step, rows, is_output, codec: tl.constexpr, DOT: tl.constexpr):
    """[rows, step] of the weight in `DOT`, before scales; codes less their middle."""
    # No early returns: Triton also compiles what follows them.
    if codec.kind == PLAIN:
        values = _bytes(pointer_of(lines, WEIGHT, x.dtype.element_ty), step, rows, is_output, codec)
    elif codec.kind == FP8:
        values = _e4m3(_bytes(pointer_of(lines, WEIGHT, tl.uint8), step, rows, is_output, codec), DOT)
    elif codec.kind == INT8:
        values = _bytes(pointer_of(lines, WEIGHT, tl.int8), step, rows, is_output, codec)
    elif codec.kind == E2M1:
        values = _value(_words(lines, step, rows, is_output, codec), codec)
    else:
        if codec.bits == 8:
            codes = _bytes(pointer_of(lines, WEIGHT, tl.uint8), step, rows, is_output, codec).to(tl.int32)
        else:
            codes = _words(lines, step, rows, is_output, codec)
        values = _value(codes, codec)
    return values.to(DOT)


@triton.jit
def _e4m3(codes, DOT: tl.constexpr):
    """The values of e4m3 codes; those that are no number have been refused."""
    if DOT.is_bf16():
        values = tl.inline_asm_elementwise(E4M3_BF16, E4M3_CONSTRAINTS, [codes], tl.bfloat16, is_pure=True, pack=4)
    elif DOT.is_fp16():
        values = tl.inline_asm_elementwise(E4M3_FP16, E4M3_CONSTRAINTS, [codes], tl.float16, is_pure=True, pack=4)
    else:
        bits = codes.to(tl.int32)
        bits = ((bits & 0x80) << 24) | ((bits & 0x7F) << 20)
        values = bits.to(tl.float32, bitcast=True) * E4M3_FACTOR
    return values


@triton.jit
def _bytes(weight, step, rows, is_output, codec: tl.constexpr):
    """[rows, step] of a matrix that lies row by row."""
    columns = step * codec.step + tl.arange(0, codec.step)
    place = in_rows(weight) + rows.to(tl.int64)[:, None] * codec.stored_columns + columns[None, :]
    if codec.stored_columns == codec.width:
        return tl.load(place, is_output[:, None])
    return tl.load(place, is_output[:, None] & (columns < codec.stored_columns)[None, :])


@triton.jit
def _words(lines, step, rows, is_output, codec: tl.constexpr):
    """int32 [rows, step] of codes, joined of their planes."""
    codes = _plane(lines, step, rows, is_output, codec, 0)
    for index in tl.static_range(1, len(codec.planes)):
        codes |= _plane(lines, step, rows, is_output, codec, index)
    return codes


@triton.jit
def _plane(lines, step, rows, is_output, codec: tl.constexpr, NUMBER: tl.constexpr):
    BITS: tl.constexpr = codec.planes[NUMBER][0]
    BELOW: tl.constexpr = codec.planes[NUMBER][1]
    FIRST: tl.constexpr = codec.rows * codec.width * (codec.bits - BITS - BELOW) // 32
    STEP: tl.constexpr = codec.step
    WORDS: tl.constexpr = codec.step * BITS // 32
    weight = pointer_of(lines, WEIGHT, tl.int32) + FIRST + step * (codec.rows * WORDS)
    words = tl.load(in_rows(weight) + rows[:, None] * WORDS + tl.arange(0, WORDS)[None, :], is_output[:, None])
    parts = (words[:, :, None] >> (tl.arange(0, 32 // BITS) * BITS)[None, None, :]) & ((1 << BITS) - 1)
    return tl.reshape(parts, (rows.shape[0], STEP)) << BELOW


@triton.jit
def read_slices(lines, step, rows, is_output, codec: tl.constexpr, DOT: tl.constexpr):
    """Every field [slice, rows] of a step's words, each a slice of the weight in `DOT`, before scales."""
    if codec.kind == FP8:
        found = _octets(lines, step, rows, is_output, codec, DOT)
    else:
        found = _fields(lines, step, rows, is_output, codec, DOT)
    return found


@triton.jit
def _sliced_words(lines, step, rows, is_output, codec: tl.constexpr):
    """int32 [slice, rows]: a step's words."""
    WORDS: tl.constexpr = codec.slice_columns
    weight = pointer_of(lines, WEIGHT, tl.int32) + step * (codec.rows * WORDS)
    words = tl.load(in_rows(weight) + rows[:, None] * WORDS + tl.arange(0, WORDS)[None, :], is_output[:, None])
    return tl.trans(words)


@triton.jit
def _octets(lines, step, rows, is_output, codec: tl.constexpr, DOT: tl.constexpr):
    """The 4 fields of a step's words, e4m3 codes."""
    words = _sliced_words(lines, step, rows, is_output, codec)
    if DOT.is_bf16():
        return tl.inline_asm_elementwise(
            OCTETS_BF16, OCTETS_CONSTRAINTS, [words], (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True, pack=2,
        )  # fmt: skip
    if DOT.is_fp16():
        return tl.inline_asm_elementwise(
            OCTETS_FP16, OCTETS_CONSTRAINTS, [words], (tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True, pack=2,
        )  # fmt: skip
    return (
        _e4m3(words & 255, DOT).to(DOT),
        _e4m3((words >> 8) & 255, DOT).to(DOT),
        _e4m3((words >> 16) & 255, DOT).to(DOT),
        _e4m3((words >> 24) & 255, DOT).to(DOT),
    )


@triton.jit
def _fields(lines, step, rows, is_output, codec: tl.constexpr, DOT: tl.constexpr):
    """The 8 fields of a step's words, of 4 bits each."""
    words = _sliced_words(lines, step, rows, is_output, codec)
    # Types are spelled out: Triton takes no others.
    if codec.kind == CODES and DOT.is_bf16():
        return tl.inline_asm_elementwise(
            FIELDS_BF16, FIELDS_CONSTRAINTS, [words],
            (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True, pack=2,
        )  # fmt: skip
    if codec.kind == CODES and DOT.is_fp16():
        return tl.inline_asm_elementwise(
            FIELDS_FP16, FIELDS_CONSTRAINTS, [words],
            (tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True, pack=2,
        )  # fmt: skip
    return (
        _value(words & 15, codec).to(DOT),
        _value((words >> 4) & 15, codec).to(DOT),
        _value((words >> 8) & 15, codec).to(DOT),
        _value((words >> 12) & 15, codec).to(DOT),
        _value((words >> 16) & 15, codec).to(DOT),
        _value((words >> 20) & 15, codec).to(DOT),
        _value((words >> 24) & 15, codec).to(DOT),
        _value((words >> 28) & 15, codec).to(DOT),
    )


@triton.jit
def join_slices(slices, FIRST: tl.constexpr, NUMBER: tl.constexpr):
    """[NUMBER * slice, outputs] of as many slices [slice, outputs], one below the other."""
    if NUMBER == 1:
        found = slices[FIRST]
    else:
        above = join_slices(slices, FIRST, NUMBER // 2)
        pairs = tl.join(above, join_slices(slices, FIRST + NUMBER // 2, NUMBER // 2))
        found = tl.reshape(tl.permute(pairs, 2, 0, 1), (2 * above.shape[0], above.shape[1]))
    return found


@triton.jit
def _value(codes, codec: tl.constexpr):
    """float32 of codes, less their middle."""
    if codec.kind == E2M1:
        return _halves(codes)
    return (codes | MAGIC_BITS).to(tl.float32, bitcast=True) - (MAGIC + codec.middle)


@triton.jit
def _halves(codes):
    """e2m1 codes -> float32, twice their values: 0, 1, 2, 3, 4, 6, 8, 12 and the same below zero."""
    exponent = (codes >> 1) & 3
    fraction = codes & 1
    size = tl.where(exponent == 0, fraction, (2 + fraction) << tl.maximum(exponent - 1, 0))
    return tl.where((codes & 8) != 0, -size, size).to(tl.float32)


@triton.jit
def read_scale(lines, group, rows, is_output, codec: tl.constexpr):
    """float32 [rows]."""
    place = rows // codec.block + group * codec.row_groups
    if codec.scale == "float32":
        scale = tl.load(pointer_of(lines, SCALE, tl.float32) + place, is_output, 1.0)
    elif codec.scale == "float16":
        scale = tl.load(pointer_of(lines, SCALE, tl.float16) + place, is_output, 1.0).to(tl.float32)
    elif codec.scale == "bfloat16":
        scale = tl.load(pointer_of(lines, SCALE, tl.bfloat16) + place, is_output, 1.0).to(tl.float32)
    elif codec.scale == "float8_e4m3fn":
        scale = _e4m3(tl.load(pointer_of(lines, SCALE, tl.uint8) + place, is_output, 0), tl.float32)
    else:  # float8_e8m0fnu: an exponent, whose least is half of the least normal number
        exponent = tl.load(pointer_of(lines, SCALE, tl.uint8) + place, is_output, 127).to(tl.int32)
        bits = tl.where(exponent == 0, 1 << 22, exponent << 23)
        scale = bits.to(tl.float32, bitcast=True)
    if codec.divides:
        scale = tl.where(scale == 0, 0.0, 1.0 / scale)
    return scale


@triton.jit
def read_zero(lines, group, rows, is_output, codec: tl.constexpr):
    """float32 [rows]: zero points less the middle of the codes."""
    zeros = pointer_of(lines, ZERO, tl.uint8)
    if codec.zero_bits == 8:
        stored = tl.load(zeros + rows // codec.block + group * codec.row_groups, is_output, 0).to(tl.int32)
    else:
        pairs = tl.load(zeros + rows // 2 + group * ((codec.row_groups + 1) // 2), is_output, 0).to(tl.int32)
        stored = (pairs >> (rows % 2 * 4)) & 15
    return (stored + (codec.zero_offset - codec.middle)).to(tl.float32)


@triton.jit
def read_bias(lines, outputs, is_output, TYPE: tl.constexpr):
    """float32 [outputs], each of its own line of a table, or all of one; zeros where that has no bias."""
    address = tl.load(lines + BIAS)
    return tl.load(address.to(tl.pointer_type(TYPE)) + outputs, is_output & (address != 0), 0.0).to(tl.float32)


@triton.jit
def in_rows(one):
    """[rows, 1] of something for each row; a scalar, which stands for all of them, stays one."""
    return one[:, None] if one.type.is_block() else one


@triton.jit
def pointer_of(lines, FIELD: tl.constexpr, TYPE: tl.constexpr):
    """Addresses of a field of each line, or of one, which may be given as a tuple: nothing is waited for then."""
    address = tl.load(lines + FIELD) if isinstance(lines, tl.tensor) else lines[FIELD]
    return tl.multiple_of(address.to(tl.int64).to(tl.pointer_type(TYPE)), 16)
