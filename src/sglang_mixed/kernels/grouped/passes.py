"""Triton: a linear layer, and a MoE layer whose experts' matrices are each stored in a format of their own.

A (token, slot) is a *pair*, numbered token * top-k + slot. Pairs are sorted by expert into blocks of BLOCK_M places, so
that every program has one expert. All shapes follow from the number of tokens alone: nothing waits for the device.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import activate
from .decode import FIELDS, read_bias
from .overlap import begin
from .product import multiply


@triton.jit(do_not_specialize=("num_pairs", "num_blocks"))
def sort_pairs(
    ids,
    pairs,
    experts,
    num_pairs,
    num_blocks,
    NUM_EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Program e writes expert e's pairs, in their order, to its blocks of `pairs` [blocks, BLOCK_M], -1 to the rest of
    them, and e to `experts` [blocks]; the last program writes -1 for blocks that no expert needs. BINS is a power of
    two above NUM_EXPERTS.
    """
    begin(OVERLAPS)
    expert = tl.program_id(0)
    places = tl.arange(0, CHUNK)
    counts = tl.zeros((BINS,), tl.int32)
    for passed in range(0, num_pairs, CHUNK):
        own = tl.load(ids + passed + places, passed + places < num_pairs, -1).to(tl.int32)
        counts += tl.histogram(tl.where(own < 0, NUM_EXPERTS, own), BINS)
    numbers = tl.arange(0, BINS)
    blocks = tl.where(numbers < NUM_EXPERTS, (counts + BLOCK_M - 1) // BLOCK_M, 0)
    first = tl.sum(tl.where(numbers < expert, blocks, 0))
    after = first + tl.sum(tl.where(numbers == expert, blocks, 0))
    rank = first * BLOCK_M
    for passed in range(0, num_pairs, CHUNK):
        own = tl.load(ids + passed + places, passed + places < num_pairs, -1).to(tl.int32)
        is_own = own == expert
        tl.store(pairs + rank + tl.cumsum(is_own.to(tl.int32)) - 1, passed + places, is_own)
        rank += tl.sum(is_own.to(tl.int32))
    rest = tl.arange(0, BLOCK_M)
    tl.store(pairs + rank + rest, tl.full((BLOCK_M,), -1, tl.int32), rank + rest < after * BLOCK_M)
    last = tl.where(expert == NUM_EXPERTS - 1, num_blocks, after)
    for block in range(first, last):
        tl.store(experts + block, tl.where(block < after, expert, -1))


@triton.jit
def gate_up(
    x,
    output,
    table,
    pairs,
    experts,
    alpha,
    limit,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    TOP_K: tl.constexpr,
    CODECS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALIKE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """output [pairs, INTERMEDIATE]: each pair's activated product of gate and up.

    Of `table` [experts, 3, FIELDS] the first two lines of an expert are its gate and up; `ALIKE`: they have one codec.
    """
    begin(OVERLAPS)
    block = tl.program_id(1)
    expert = tl.load(experts + block)
    if expert < 0:
        return
    own = tl.load(pairs + block * BLOCK_M + tl.arange(0, BLOCK_M))
    is_pair = own >= 0
    rows = tl.where(is_pair, own // TOP_K, 0).to(tl.int64)
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_output = outputs < INTERMEDIATE
    line = table + expert * (3 * FIELDS)
    if ALIKE:  # rows of gate and up take turns, so that those of one output end up in one thread
        turns = tl.arange(0, 2 * BLOCK_N)
        numbers, lines = tl.program_id(0) * BLOCK_N + turns // 2, line + turns % 2 * FIELDS
        both = multiply(x, rows, is_pair, line, lines, numbers, HIDDEN, INTERMEDIATE, CODECS, DOT)
        gate, up = tl.split(tl.reshape(both, (BLOCK_M, BLOCK_N, 2)))
    else:
        gate = multiply(x, rows, is_pair, line, line, outputs, HIDDEN, INTERMEDIATE, CODECS, DOT)
        second = line + FIELDS
        up = multiply(x, rows, is_pair, second, second, outputs, HIDDEN, INTERMEDIATE, CODECS, DOT)
    if HAS_BIAS:
        gate += read_bias(line, outputs, is_output, x.dtype.element_ty)[None, :]
        up += read_bias(line + FIELDS, outputs, is_output, x.dtype.element_ty)[None, :]
    found = activate(gate, up, alpha, limit, ACTIVATION)
    place = output + own.to(tl.int64)[:, None] * INTERMEDIATE + outputs[None, :]
    tl.store(place, found.to(output.dtype.element_ty), is_pair[:, None] & is_output[None, :])


@triton.jit
def down(
    x,
    output,
    table,
    pairs,
    experts,
    weights,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    CODECS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """output [pairs, HIDDEN] in float32: each pair's down product, times the router's weight."""
    block = tl.program_id(1)
    expert = tl.load(experts + block)  # sorted before the kernel ahead began
    own = tl.load(pairs + block * BLOCK_M + tl.arange(0, BLOCK_M))
    begin(OVERLAPS)
    if expert < 0:
        return
    is_pair = own >= 0
    rows = tl.where(is_pair, own, 0).to(tl.int64)
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_output = outputs < HIDDEN
    line = table + expert * (3 * FIELDS) + 2 * FIELDS
    found = multiply(x, rows, is_pair, line, line, outputs, INTERMEDIATE, HIDDEN, CODECS, DOT)
    if HAS_BIAS:
        found += read_bias(line, outputs, is_output, x.dtype.element_ty)[None, :]
    # Read once more: through all steps they would take registers.
    own = tl.load(pairs + block * BLOCK_M + tl.arange(0, BLOCK_M), volatile=True)
    is_pair = own >= 0
    rows = tl.where(is_pair, own, 0).to(tl.int64)
    found *= tl.load(weights + rows, is_pair, 0.0).to(tl.float32)[:, None]
    tl.store(output + rows[:, None] * HIDDEN + outputs[None, :], found, is_pair[:, None] & is_output[None, :])


@triton.jit
def sum_slots(
    x,
    ids,
    output,
    factor,
    HIDDEN: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """output [tokens, HIDDEN]: the sum of a token's pairs in x [pairs, HIDDEN] whose ids are not -1, times `factor`."""
    begin(OVERLAPS)
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in range(TOP_K):
        pair = token * TOP_K + slot
        is_there = (columns < HIDDEN) & (tl.load(ids + pair) >= 0)
        total += tl.load(x + pair * HIDDEN + columns, is_there, 0.0)
    tl.store(output + token * HIDDEN + columns, (total * factor).to(output.dtype.element_ty), columns < HIDDEN)


@triton.jit(do_not_specialize=("num_rows",))
def linear(
    x,
    output,
    bias,
    addresses,
    num_rows,
    COLUMNS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    CODECS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """output [num_rows, OUTPUTS] of x [num_rows, COLUMNS] and the weight at `addresses`, a line of a table."""
    begin(OVERLAPS)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = rows < num_rows
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_output = outputs < OUTPUTS
    found = multiply(x, rows.to(tl.int64), is_row, addresses, addresses, outputs, COLUMNS, OUTPUTS, CODECS, DOT)
    if HAS_BIAS:
        found += tl.load(bias + outputs, is_output, 0.0).to(tl.float32)[None, :]
    place = output + rows.to(tl.int64)[:, None] * OUTPUTS + outputs[None, :]
    tl.store(place, found.to(output.dtype.element_ty), is_row[:, None] & is_output[None, :])
