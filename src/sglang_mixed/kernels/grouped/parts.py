"""Triton: products of few rows, cut along their columns too: without that they have too few programs to fill a GPU.

Every part writes its sums in float32. The program that arrives last adds them all, in their order whatever the one in
which they came: so no kernel has to be launched for it, and results do not depend on chance.
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
    sums,
    arrived,
    output,
    table,
    experts,
    alpha,
    limit,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    TOP_K: tl.constexpr,
    CODECS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """output [pairs, INTERMEDIATE]: each pair's activated product of gate and up, by way of `sums`, which are those of
    every part in float32 [PARTS, pairs, 2, INTERMEDIATE].

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
    line = table + expert * (3 * FIELDS)
    own = line + matrix * FIELDS
    found = multiply(
        x, rows, is_row, own, own, outputs, HIDDEN, INTERMEDIATE, CODECS, DOT, part, PARTS,
    )  # fmt: skip
    place = (part * tl.num_programs(1) + pair) * 2 + matrix
    _store_row(sums + place * INTERMEDIATE, found, is_row, outputs, INTERMEDIATE)
    if is_last(arrived + pair * tl.num_programs(0) + tl.program_id(0), 2 * PARTS):
        is_output = outputs < INTERMEDIATE
        gate = tl.zeros((BLOCK_N,), tl.float32)
        up = tl.zeros((BLOCK_N,), tl.float32)
        for index in tl.static_range(PARTS):
            first = sums + (index * tl.num_programs(1) + pair) * (2 * INTERMEDIATE) + outputs
            gate += tl.load(first, is_output, 0.0)
            up += tl.load(first + INTERMEDIATE, is_output, 0.0)
        if HAS_BIAS:
            gate += read_bias(line, outputs, is_output, output.dtype.element_ty)
            up += read_bias(line + FIELDS, outputs, is_output, output.dtype.element_ty)
        activated = activate(gate, up, alpha, limit, ACTIVATION)
        tl.store(output + pair * INTERMEDIATE + outputs, activated.to(output.dtype.element_ty), is_output)


@triton.jit
def down_parts(
    x,
    sums,
    arrived,
    output,
    table,
    experts,
    weights,
    factor,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    CODECS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """output [tokens, HIDDEN]: the down products of a token's pairs that are not left out, each with its bias and times
    the router's weight, added up and times `factor`; by way of `sums`, those of every part in float32
    [PARTS, pairs, HIDDEN]. SLOTS is a power of two from TOP_K on.
    """
    begin(OVERLAPS)
    pair, part = tl.program_id(1), tl.program_id(2)
    expert = tl.load(experts + pair)
    is_row = tl.arange(0, BLOCK_M) == 0
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if expert >= 0:
        line = table + (expert * 3 + 2) * FIELDS
        found = multiply(
            x, tl.where(is_row, pair, 0), is_row, line, line, outputs, INTERMEDIATE, HIDDEN, CODECS, DOT, part, PARTS,
        )  # fmt: skip
        _store_row(sums + (part * tl.num_programs(1) + pair) * HIDDEN, found, is_row, outputs, HIDDEN)
    token = pair // TOP_K
    if is_last(arrived + token * tl.num_programs(0) + tl.program_id(0), TOP_K * PARTS):
        slots = tl.arange(0, SLOTS)
        is_slot, is_output = slots < TOP_K, outputs < HIDDEN
        pairs = token * TOP_K + slots
        total = tl.zeros((SLOTS, BLOCK_N), tl.float32)
        for index in tl.static_range(PARTS):  # loads do not wait for experts: what nobody wrote is left out afterwards
            place = sums + (index * tl.num_programs(1) + pairs)[:, None] * HIDDEN + outputs[None, :]
            total += tl.load(place, is_slot[:, None] & is_output[None, :], 0.0)
        own = tl.load(experts + pairs, is_slot, -1)
        is_there = own >= 0
        if HAS_BIAS:
            lines = table + (tl.where(is_there, own, 0) * 3 + 2) * FIELDS
            total += read_bias(lines[:, None], outputs[None, :], is_output[None, :], output.dtype.element_ty)
        total *= tl.load(weights + pairs, is_slot, 0.0).to(tl.float32)[:, None]
        added = tl.sum(tl.where(is_there[:, None], total, 0.0), 0) * factor
        tl.store(output + token * HIDDEN + outputs, added.to(output.dtype.element_ty), is_output)


@triton.jit(do_not_specialize=("num_rows",))
def linear_parts(
    x,
    sums,
    arrived,
    output,
    bias,
    addresses,
    num_rows,
    COLUMNS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    CODECS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """output [num_rows, OUTPUTS] of x [num_rows, COLUMNS], the weight at `addresses`, a line of a table, and a bias
    [OUTPUTS], by way of `sums`, those of every part in float32 [PARTS, num_rows, OUTPUTS].
    """
    begin(OVERLAPS)
    part = tl.program_id(2)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row, is_output = rows < num_rows, outputs < OUTPUTS
    found = multiply(
        x, rows, is_row, addresses, addresses, outputs, COLUMNS, OUTPUTS, CODECS, DOT, part, PARTS,
    )  # fmt: skip
    is_there = is_row[:, None] & is_output[None, :]
    place = rows[:, None] * OUTPUTS + outputs[None, :]
    tl.store(sums + part * num_rows * OUTPUTS + place, found, is_there)
    if is_last(arrived + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), PARTS):
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for index in tl.static_range(PARTS):
            total += tl.load(sums + index * num_rows * OUTPUTS + place, is_there, 0.0)
        if HAS_BIAS:
            total += tl.load(bias + outputs, is_output, 0.0).to(tl.float32)[None, :]
        tl.store(output + place, total.to(output.dtype.element_ty), is_there)


@triton.jit
def is_last(arrived, EXPECTED: tl.constexpr):
    """Whether all the programs of one sum, of which this is one, have written their parts. The count is 0 before the
    first and after the last, and no two launches may share it that can run at once.
    """
    tl.debug_barrier()  # one thread speaks for all
    is_there = tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") == EXPECTED - 1
    if is_there:
        tl.store(arrived, 0)
    return is_there


@triton.jit
def _store_row(output, found, is_row, outputs, OUTPUTS: tl.constexpr):
    """The one row of `found` [rows, outputs] that there is."""
    place = output + tl.zeros(is_row.shape, tl.int32)[:, None] + outputs[None, :]
    tl.store(place, found, is_row[:, None] & (outputs < OUTPUTS)[None, :])
