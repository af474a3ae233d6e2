"""Triton: rows of x times rows of a weight that is decoded in registers; one compiled branch a codec.

Values go into the products as they are stored, codes less their middle: e4m3 and whole numbers of 8 bits are exact in
BF16 and FP16. Scales and zero points meet a step's float32 sums, so nothing is rounded but x.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import codec as codecs

PLAIN = tl.constexpr(codecs.PLAIN)
FP8 = tl.constexpr(codecs.FP8)
INT8 = tl.constexpr(codecs.INT8)
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


@triton.jit
def multiply(
    x,
    rows,
    is_row,
    line,
    outputs,
    X_COLUMNS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    CODECS: tl.constexpr,
    DOT: tl.constexpr,
):
    """float32 [rows, outputs]: `rows` of x [.., X_COLUMNS] times `outputs` of the weight of a table's line.

    A row that is none, by `is_row`, comes out as zeros. `DOT` is the dtype of the products' factors.
    """
    sums = tl.zeros((rows.shape[0], outputs.shape[0]), tl.float32)
    number = tl.load(line + CODEC)
    for index in tl.static_range(len(CODECS)):
        if number == index:
            sums = _product(x, rows, is_row, line, outputs, X_COLUMNS, OUTPUTS, CODECS, index, DOT)
    return sums


@triton.jit
def bias(line, outputs, is_output, TYPE: tl.constexpr):
    """float32 [outputs] of a table's line; zeros where it has no bias."""
    address = tl.load(line + BIAS)
    return tl.load(address.to(tl.pointer_type(TYPE)) + outputs, is_output & (address != 0), 0.0).to(tl.float32)


@triton.jit
def _product(
    x,
    rows,
    is_row,
    line,
    outputs,
    X_COLUMNS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    CODECS: tl.constexpr,
    NUMBER: tl.constexpr,
    DOT: tl.constexpr,
):
    codec: tl.constexpr = CODECS[NUMBER]
    is_output = outputs < OUTPUTS
    weight_rows = outputs + codec.first_row
    sums = tl.zeros((rows.shape[0], outputs.shape[0]), tl.float32)
    input_sums = tl.zeros(rows.shape, tl.float32)
    for step in range(codec.width // codec.step):
        inputs = _inputs(x, rows, is_row, line, step, X_COLUMNS, codec).to(DOT)
        values = tl.trans(_values(x, line, step, weight_rows, is_output, codec, DOT))
        if codec.group == ALL:
            sums = tl.dot(inputs, values, sums, input_precision="ieee")
            if codec.zero_bits != 0:
                input_sums += tl.sum(inputs.to(tl.float32), 1)
        else:
            group = step * codec.step // codec.group
            if codec.is_ordered:
                group = tl.load(_pointer(line, GROUPS, tl.int32) + step)
            product = tl.dot(inputs, values, input_precision="ieee")
            if codec.zero_bits != 0:
                zero = _zero(line, group, weight_rows, is_output, codec)
                product -= tl.sum(inputs.to(tl.float32), 1)[:, None] * zero[None, :]
            sums += product * _scale(line, group, weight_rows, is_output, codec)[None, :]
    if codec.group == ALL:
        if codec.zero_bits != 0:
            sums -= input_sums[:, None] * _zero(line, 0, weight_rows, is_output, codec)[None, :]
        if codec.scale != "":
            sums *= _scale(line, 0, weight_rows, is_output, codec)[None, :]
    if codec.factor == "multiplies":
        sums *= tl.load(_pointer(line, FACTOR, tl.float32))
    elif codec.factor == "divides":
        sums /= tl.load(_pointer(line, FACTOR, tl.float32))
    if codec.kind == E2M1:  # its values are counted in halves
        sums *= 0.5
    return sums


@triton.jit
def _inputs(x, rows, is_row, line, step, X_COLUMNS: tl.constexpr, codec: tl.constexpr):
    """[rows, step]: zeros where a stored column meets none of x."""
    stored = step * codec.step + tl.arange(0, codec.step)
    if codec.is_ordered:
        meets = tl.load(_pointer(line, ORDER, tl.int32) + stored)
        columns = meets - codec.first_column
        is_column = (meets >= 0) & (columns >= 0) & (columns < X_COLUMNS)
        return tl.load(x + rows[:, None] * X_COLUMNS + columns[None, :], is_row[:, None] & is_column[None, :], 0.0)
    columns = stored - codec.first_column
    place = x + rows[:, None] * X_COLUMNS + columns[None, :]
    if codec.first_column == 0 and codec.width == X_COLUMNS:
        return tl.load(place, is_row[:, None], 0.0)
    is_column = (columns >= 0) & (columns < X_COLUMNS) & (stored < codec.columns)
    return tl.load(place, is_row[:, None] & is_column[None, :], 0.0)


@triton.jit
def _values(x, line, step, rows, is_output, codec: tl.constexpr, DOT: tl.constexpr):
    """[rows, step] of the weight in `DOT`, before scales; codes less their middle."""
    # No early returns: Triton also compiles what follows them.
    if codec.kind == PLAIN:
        values = _bytes(_pointer(line, WEIGHT, x.dtype.element_ty), step, rows, is_output, codec)
    elif codec.kind == FP8:
        values = _bytes(_pointer(line, WEIGHT, tl.float8e4nv), step, rows, is_output, codec)
    elif codec.kind == INT8:
        values = _bytes(_pointer(line, WEIGHT, tl.int8), step, rows, is_output, codec)
    elif codec.kind == E2M1:
        values = _halves(_words(line, step, rows, is_output, codec))
    else:
        if codec.bits == 8:
            codes = _bytes(_pointer(line, WEIGHT, tl.uint8), step, rows, is_output, codec).to(tl.int32)
        else:
            codes = _words(line, step, rows, is_output, codec)
        values = (codes | MAGIC_BITS).to(tl.float32, bitcast=True) - (MAGIC + codec.middle)
    return values.to(DOT)


@triton.jit
def _bytes(weight, step, rows, is_output, codec: tl.constexpr):
    """[rows, step] of a matrix that lies row by row."""
    columns = step * codec.step + tl.arange(0, codec.step)
    place = weight + rows.to(tl.int64)[:, None] * codec.stored_columns + columns[None, :]
    if codec.stored_columns == codec.width:
        return tl.load(place, is_output[:, None])
    return tl.load(place, is_output[:, None] & (columns < codec.stored_columns)[None, :])


@triton.jit
def _words(line, step, rows, is_output, codec: tl.constexpr):
    """int32 [rows, step] of codes, joined of their planes."""
    codes = _plane(line, step, rows, is_output, codec, 0)
    for index in tl.static_range(1, len(codec.planes)):
        codes |= _plane(line, step, rows, is_output, codec, index)
    return codes


@triton.jit
def _plane(line, step, rows, is_output, codec: tl.constexpr, NUMBER: tl.constexpr):
    BITS: tl.constexpr = codec.planes[NUMBER][0]
    BELOW: tl.constexpr = codec.planes[NUMBER][1]
    FIRST: tl.constexpr = codec.rows * codec.width * (codec.bits - BITS - BELOW) // 32
    STEP: tl.constexpr = codec.step
    WORDS: tl.constexpr = codec.step * BITS // 32
    weight = _pointer(line, WEIGHT, tl.int32) + FIRST + step * (codec.rows * WORDS)
    words = tl.load(weight + rows[:, None] * WORDS + tl.arange(0, WORDS)[None, :], is_output[:, None])
    parts = (words[:, :, None] >> (tl.arange(0, 32 // BITS) * BITS)[None, None, :]) & ((1 << BITS) - 1)
    return tl.reshape(parts, (rows.shape[0], STEP)) << BELOW


@triton.jit
def _halves(codes):
    """e2m1 codes -> float32, twice their values: 0, 1, 2, 3, 4, 6, 8, 12 and the same below zero."""
    exponent = (codes >> 1) & 3
    fraction = codes & 1
    size = tl.where(exponent == 0, fraction, (2 + fraction) << tl.maximum(exponent - 1, 0))
    return tl.where((codes & 8) != 0, -size, size).to(tl.float32)


@triton.jit
def _scale(line, group, rows, is_output, codec: tl.constexpr):
    """float32 [rows]."""
    place = rows // codec.block + group * codec.row_groups
    if codec.scale == "float32":
        scale = tl.load(_pointer(line, SCALE, tl.float32) + place, is_output, 1.0)
    elif codec.scale == "float16":
        scale = tl.load(_pointer(line, SCALE, tl.float16) + place, is_output, 1.0).to(tl.float32)
    elif codec.scale == "bfloat16":
        scale = tl.load(_pointer(line, SCALE, tl.bfloat16) + place, is_output, 1.0).to(tl.float32)
    elif codec.scale == "float8_e4m3fn":
        scale = tl.load(_pointer(line, SCALE, tl.float8e4nv) + place, is_output, 1.0).to(tl.float32)
    else:  # float8_e8m0fnu: an exponent, whose least is half of the least normal number
        exponent = tl.load(_pointer(line, SCALE, tl.uint8) + place, is_output, 127).to(tl.int32)
        bits = tl.where(exponent == 0, 1 << 22, exponent << 23)
        scale = bits.to(tl.float32, bitcast=True)
    if codec.divides:
        scale = tl.where(scale == 0, 0.0, 1.0 / scale)
    return scale


@triton.jit
def _zero(line, group, rows, is_output, codec: tl.constexpr):
    """float32 [rows]: zero points less the middle of the codes."""
    zeros = _pointer(line, ZERO, tl.uint8)
    if codec.zero_bits == 8:
        stored = tl.load(zeros + rows // codec.block + group * codec.row_groups, is_output, 0).to(tl.int32)
    else:
        pairs = tl.load(zeros + rows // 2 + group * ((codec.row_groups + 1) // 2), is_output, 0).to(tl.int32)
        stored = (pairs >> (rows % 2 * 4)) & 15
    return (stored + (codec.zero_offset - codec.middle)).to(tl.float32)


@triton.jit
def _pointer(line, FIELD: tl.constexpr, TYPE: tl.constexpr):
    return tl.multiple_of(tl.load(line + FIELD).to(tl.pointer_type(TYPE)), 16)
