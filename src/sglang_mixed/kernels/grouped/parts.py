"""Triton: products of few rows, cut along their columns too: without that they have too few programs to fill a GPU.

Every part writes its sums in float32, and what comes next adds them in their order: results do not depend on which part
was ready first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import activate
from .decode import FIELDS, read_bias
from .overlap import begin
from .product import multiply


@triton.jit
def gate_up_parts(
    x,
    output,
    table,
    experts,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    TOP_K: tl.constexpr,
    CODECS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """output [PARTS, pairs, 2, INTERMEDIATE] in float32: each pair's products of gate and up, without their biases.

    `table` [experts, 3, FIELDS], `experts` [pairs]: -1 for a pair to leave out.
    """
    begin(OVERLAPS)
    pair, number = tl.program_id(1), tl.program_id(2)
    expert = tl.load(experts + pair)
    if expert < 0:
        return
    matrix, part = number % 2, number // 2
    is_row = tl.arange(0, BLOCK_M) == 0
    rows = tl.where(is_row, pair // TOP_K, 0)
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    line = table + (expert * 3 + matrix) * FIELDS
    found = multiply(
        x, rows, is_row, line, line, outputs, HIDDEN, INTERMEDIATE, CODECS, DOT, part, PARTS,
    )  # fmt: skip
    place = (part * tl.num_programs(1) + pair) * 2 + matrix
    _store_row(output + place * INTERMEDIATE, found, is_row, outputs, INTERMEDIATE)


@triton.jit
def activate_parts(
    x,
    output,
    table,
    experts,
    alpha,
    limit,
    INTERMEDIATE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """output [pairs, INTERMEDIATE]: parts of gate and up added, with their biases, and activated."""
    begin(OVERLAPS)
    pair = tl.program_id(0)
    expert = tl.load(experts + pair)
    if expert < 0:
        return
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = columns < INTERMEDIATE
    gate = tl.zeros((BLOCK,), tl.float32)
    up = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        place = x + (part * tl.num_programs(0) + pair) * (2 * INTERMEDIATE) + columns
        gate += tl.load(place, is_column, 0.0)
        up += tl.load(place + INTERMEDIATE, is_column, 0.0)
    if HAS_BIAS:
        line = table + expert * (3 * FIELDS)
        gate += read_bias(line, columns, is_column, output.dtype.element_ty)
        up += read_bias(line + FIELDS, columns, is_column, output.dtype.element_ty)
    found = activate(gate, up, alpha, limit, ACTIVATION)
    tl.store(output + pair * INTERMEDIATE + columns, found.to(output.dtype.element_ty), is_column)


@triton.jit
def down_parts(
    x,
    output,
    table,
    experts,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    CODECS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """output [PARTS, pairs, HIDDEN] in float32: each pair's down product, without its bias and the router's weight."""
    begin(OVERLAPS)
    pair, part = tl.program_id(1), tl.program_id(2)
    expert = tl.load(experts + pair)
    if expert < 0:
        return
    is_row = tl.arange(0, BLOCK_M) == 0
    rows = tl.where(is_row, pair, 0)
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    line = table + (expert * 3 + 2) * FIELDS
    found = multiply(
        x, rows, is_row, line, line, outputs, INTERMEDIATE, HIDDEN, CODECS, DOT, part, PARTS,
    )  # fmt: skip
    _store_row(output + (part * tl.num_programs(1) + pair) * HIDDEN, found, is_row, outputs, HIDDEN)


@triton.jit
def _store_row(output, found, is_row, outputs, OUTPUTS: tl.constexpr):
    """The one row of `found` [rows, outputs] that there is."""
    place = output + tl.zeros(is_row.shape, tl.int32)[:, None] + outputs[None, :]
    tl.store(place, found, is_row[:, None] & (outputs < OUTPUTS)[None, :])


@triton.jit
def sum_parts(
    x,
    ids,
    weights,
    table,
    output,
    factor,
    HIDDEN: tl.constexpr,
    TOP_K: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """output [tokens, HIDDEN] of x [PARTS, pairs, HIDDEN]: a token's pairs whose ids are not -1, each with its bias and
    times the router's weight, added up and times `factor`. SLOTS is a power of two from TOP_K on.
    """
    begin(OVERLAPS)
    token = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slots = tl.arange(0, SLOTS)
    is_slot, is_column = slots < TOP_K, columns < HIDDEN
    pairs = token * TOP_K + slots
    total = tl.zeros((SLOTS, BLOCK), tl.float32)
    for part in tl.static_range(PARTS):  # loads do not wait for ids: what nobody wrote is left out afterwards
        place = x + (part * tl.num_programs(0) * TOP_K + pairs)[:, None] * HIDDEN + columns[None, :]
        total += tl.load(place, is_slot[:, None] & is_column[None, :], 0.0)
    experts = tl.load(ids + pairs, is_slot, -1).to(tl.int32)
    is_there = experts >= 0
    if HAS_BIAS:
        lines = table + (tl.where(is_there, experts, 0) * 3 + 2) * FIELDS
        total += read_bias(lines[:, None], columns[None, :], is_column[None, :], output.dtype.element_ty)
    total *= tl.load(weights + pairs, is_slot, 0.0).to(tl.float32)[:, None]
    found = tl.sum(tl.where(is_there[:, None], total, 0.0), 0) * factor
    tl.store(output + token * HIDDEN + columns, found.to(output.dtype.element_ty), is_column)


@triton.jit(do_not_specialize=("num_rows",))
def linear_parts(
    x,
    output,
    table,
    num_rows,
    COLUMNS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    CODECS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """output [PARTS, num_rows, OUTPUTS] in float32 of x [num_rows, COLUMNS] and `table`'s weight."""
    begin(OVERLAPS)
    part = tl.program_id(2)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = rows < num_rows
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    found = multiply(
        x, rows, is_row, table, table, outputs, COLUMNS, OUTPUTS, CODECS, DOT, part, PARTS,
    )  # fmt: skip
    place = output + (part * num_rows + rows)[:, None] * OUTPUTS + outputs[None, :]
    tl.store(place, found, is_row[:, None] & (outputs < OUTPUTS)[None, :])


@triton.jit
def sum_rows(
    x,
    bias,
    output,
    OUTPUTS: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """output [rows, OUTPUTS] of x [PARTS, rows, OUTPUTS] and a bias [OUTPUTS]."""
    begin(OVERLAPS)
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = columns < OUTPUTS
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(x + (part * tl.num_programs(0) + row) * OUTPUTS + columns, is_column, 0.0)
    if HAS_BIAS:
        total += tl.load(bias + columns, is_column, 0.0).to(tl.float32)
    tl.store(output + row * OUTPUTS + columns, total.to(output.dtype.element_ty), is_column)
