"""Triton: rows of x times rows of a weight that is decoded in registers.

Scales and zero points meet a step's float32 sums, so nothing is rounded but x.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decode import (
    ALL,
    CODEC,
    E2M1,
    FACTOR,
    GROUPS,
    ORDER,
    join_slices,
    pointer_of,
    read_scale,
    read_slices,
    read_values,
    read_zero,
)

#: Rows up to which a step's scales are loaded a step ahead: with more of them registers are scarce, and time is not.
FEW_ROWS = tl.constexpr(16)
#: Up to how many rows and outputs products are computed transposed, whatever the codec. (Values in slices always are:
#: Hopper's tensor cores take their first factor from registers, and the second only from shared memory.)
TURNED_ROWS, TURNED_OUTPUTS = tl.constexpr(8), tl.constexpr(64)


@triton.jit
def multiply(
    x,
    rows,
    is_row,
    line,
    lines,
    outputs,
    X_COLUMNS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    CODECS: tl.constexpr,
    DOT: tl.constexpr,
    part=0,
    PARTS: tl.constexpr = 1,
):
    """float32 [rows, outputs]: `rows` of x [.., X_COLUMNS] times `outputs` of weights, each from a table's line.

    All `lines` have the codec, order and groups of `line`, which may stand for all of them. A row that is none, by
    `is_row`, comes out as zeros. `DOT` is the dtype of the products' factors. Of `PARTS` runs of steps only `part` is
    summed.
    """
    sums = tl.zeros((rows.shape[0], outputs.shape[0]), tl.float32)
    number = tl.load(line + CODEC) if len(CODECS) > 1 else 0
    for index in tl.static_range(len(CODECS)):
        if number == index:
            sums = _product(x, rows, is_row, line, lines, outputs, X_COLUMNS, OUTPUTS, CODECS, index, DOT, part, PARTS)
    return sums


@triton.jit
def _product(
    x,
    rows,
    is_row,
    line,
    lines,
    outputs,
    X_COLUMNS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    CODECS: tl.constexpr,
    NUMBER: tl.constexpr,
    DOT: tl.constexpr,
    part,
    PARTS: tl.constexpr,
):
    codec: tl.constexpr = CODECS[NUMBER]
    if tl.cdiv(OUTPUTS, outputs.shape[0]) * outputs.shape[0] == OUTPUTS:  # nothing to ask at each load
        is_output = tl.full(outputs.shape, True, tl.int1)
    else:
        is_output = outputs < OUTPUTS
    weight_rows = outputs + codec.first_row
    STEPS: tl.constexpr = codec.width // codec.step
    OWN: tl.constexpr = (STEPS + PARTS - 1) // PARTS
    first = tl.minimum(part * OWN, STEPS)  # a codec of few steps leaves its last parts without any
    last = tl.minimum(first + OWN, STEPS)
    sums, input_sums = _sums(x, rows, is_row, line, lines, weight_rows, is_output, X_COLUMNS, codec, DOT, first, last)
    if codec.group == ALL:
        if codec.zero_bits != 0:
            sums -= input_sums[:, None] * read_zero(lines, 0, weight_rows, is_output, codec)[None, :]
        if codec.scale != "":
            sums *= read_scale(lines, 0, weight_rows, is_output, codec)[None, :]
    if codec.factor == "multiplies":
        sums *= _in_columns(tl.load(pointer_of(lines, FACTOR, tl.float32)))
    elif codec.factor == "divides":
        sums /= _in_columns(tl.load(pointer_of(lines, FACTOR, tl.float32)))
    if codec.kind == E2M1:  # its values are counted in halves
        sums *= 0.5
    return sums


@triton.jit
def _sums(
    x,
    rows,
    is_row,
    line,
    lines,
    weight_rows,
    is_output,
    X_COLUMNS: tl.constexpr,
    codec: tl.constexpr,
    DOT: tl.constexpr,
    first,
    last,
):
    """Sums over some steps, one at a time, and those of the inputs; scaled where the weight has groups.

    Of values in slices none changes its thread between memory and product, and a step may be of several groups. With
    many rows their product is taken in pieces, 4 bits in two and bytes in four: all at once would run out of registers.
    """
    HAS_FEW_ROWS: tl.constexpr = rows.shape[0] <= FEW_ROWS
    GROUPS: tl.constexpr = max(1, codec.step // codec.group)
    PIECES: tl.constexpr = codec.bits // 2 if codec.is_sliced and GROUPS == 1 and not HAS_FEW_ROWS else 1
    COLUMNS: tl.constexpr = codec.step // (GROUPS * PIECES)
    SLICES: tl.constexpr = COLUMNS // codec.slice_columns
    AHEAD: tl.constexpr = HAS_FEW_ROWS and GROUPS == 1
    IS_SMALL: tl.constexpr = rows.shape[0] <= TURNED_ROWS and weight_rows.shape[0] <= TURNED_OUTPUTS
    TURNS: tl.constexpr = codec.is_sliced or IS_SMALL
    STEPS: tl.constexpr = codec.width // codec.step
    nothing = _zeros(rows, weight_rows, TURNS)
    sums, input_sums = nothing, tl.zeros(rows.shape, tl.float32)
    if codec.group != ALL and AHEAD:
        scale = read_scale(lines, _group(line, tl.minimum(first, STEPS - 1), codec), weight_rows, is_output, codec)
    for step in range(first, last):
        if codec.is_sliced:
            slices = read_slices(lines, step, weight_rows, is_output, codec, DOT)
        for number in tl.static_range(GROUPS):
            group = _group(line, step, codec) + number
            if codec.group != ALL and AHEAD:
                own = scale  # what the next step needs is on its way before this one's product
                following = tl.minimum(step + 1, STEPS - 1)
                scale = read_scale(lines, _group(line, following, codec), weight_rows, is_output, codec)
            product = nothing
            for piece in tl.static_range(PIECES):
                stored = step * codec.step + (number * PIECES + piece) * COLUMNS + tl.arange(0, COLUMNS)
                inputs = _inputs(x, rows, is_row, line, stored, X_COLUMNS, codec).to(DOT)
                if codec.is_sliced:
                    values = join_slices(slices, (number * PIECES + piece) * SLICES, SLICES)
                else:
                    values = tl.trans(read_values(x, lines, step, weight_rows, is_output, codec, DOT))
                if codec.group != ALL:
                    product = _add(inputs, values, product, lines, group, weight_rows, is_output, codec, TURNS)
                else:
                    sums = _dot(inputs, values, sums, TURNS)
                    if codec.zero_bits != 0:
                        input_sums += tl.sum(inputs.to(tl.float32), 1)
            if codec.group != ALL:
                if not AHEAD:
                    own = read_scale(lines, group, weight_rows, is_output, codec)
                sums += product * _by_output(own, TURNS)
    return tl.trans(sums) if TURNS else sums, input_sums


@triton.jit
def _zeros(rows, outputs, TURNS: tl.constexpr):
    if TURNS:
        found = tl.zeros((outputs.shape[0], rows.shape[0]), tl.float32)
    else:
        found = tl.zeros((rows.shape[0], outputs.shape[0]), tl.float32)
    return found


@triton.jit
def _add(inputs, values, product, lines, group, weight_rows, is_output, codec: tl.constexpr, TURNS: tl.constexpr):
    """product + inputs [rows, columns] · values [columns, outputs], which are of one group, less its zero points."""
    FOLDS_ZEROS: tl.constexpr = codec.is_sliced and inputs.shape[0] > FEW_ROWS
    if codec.zero_bits != 0:
        zero = read_zero(lines, group, weight_rows, is_output, codec)
        if FOLDS_ZEROS:  # differences of codes are exact in 16 bits
            values -= zero[None, :].to(values.dtype)
    product = _dot(inputs, values, product, TURNS)
    if codec.zero_bits != 0 and not FOLDS_ZEROS:
        product -= _by_row(tl.sum(inputs.to(tl.float32), 1), TURNS) * _by_output(zero, TURNS)
    return product


@triton.jit
def _in_columns(one):
    return one[None, :] if one.type.is_block() else one


@triton.jit
def _dot(inputs, values, sums, TURNS: tl.constexpr):
    """sums + inputs [rows, columns] · values [columns, outputs], or that transposed."""
    if TURNS:
        found = tl.dot(tl.trans(values), tl.trans(inputs), sums, input_precision="ieee")
    else:
        found = tl.dot(inputs, values, sums, input_precision="ieee")
    return found


@triton.jit
def _by_output(one, TURNS: tl.constexpr):
    return one[:, None] if TURNS else one[None, :]


@triton.jit
def _by_row(one, TURNS: tl.constexpr):
    return one[None, :] if TURNS else one[:, None]


@triton.jit
def _group(line, step, codec: tl.constexpr):
    """The (first) group of a step."""
    if codec.is_ordered:
        return tl.load(pointer_of(line, GROUPS, tl.int32) + step)
    return step * codec.step // codec.group


@triton.jit
def _inputs(x, rows, is_row, line, stored, X_COLUMNS: tl.constexpr, codec: tl.constexpr):
    """[rows, stored]: zeros where a stored column meets none of x."""
    if codec.is_ordered:
        meets = tl.load(pointer_of(line, ORDER, tl.int32) + stored)
        columns = meets - codec.first_column
        is_column = (meets >= 0) & (columns >= 0) & (columns < X_COLUMNS)
        return tl.load(x + rows[:, None] * X_COLUMNS + columns[None, :], is_row[:, None] & is_column[None, :], 0.0)
    columns = stored - codec.first_column
    place = x + rows[:, None] * X_COLUMNS + columns[None, :]
    if codec.first_column == 0 and codec.width == X_COLUMNS:
        return tl.load(place, is_row[:, None], 0.0)
    is_column = (columns >= 0) & (columns < X_COLUMNS) & (stored < codec.columns)
    return tl.load(place, is_row[:, None] & is_column[None, :], 0.0)
