"""Triton: what stands between a layer's first two products and its last."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from .decode import FIELDS, read_bias


@dataclass(frozen=True, slots=True)
class Pending:
    """What is still to be done with products of gate and up: parts to add, a bias, the activation."""

    parts: int
    has_bias: bool
    activation: str


@triton.jit
def activated(source, columns, is_column, COLUMNS: tl.constexpr, TYPE: tl.constexpr, PENDING: tl.constexpr):
    """`columns` of a pair's hidden values, rounded to `TYPE`.

    `source`: sums [parts, pairs, 2, COLUMNS], how many pairs, which of them, its expert's lines, alpha, limit.
    """
    PARTS: tl.constexpr = PENDING.parts
    ACTIVATION: tl.constexpr = PENDING.activation
    sums, num_pairs, pair, line, alpha, limit = source
    gate = tl.zeros(columns.shape, tl.float32)
    up = tl.zeros(columns.shape, tl.float32)
    for part in tl.static_range(PARTS):
        place = sums + (part * num_pairs + pair) * (2 * COLUMNS) + columns
        gate += tl.load(place, is_column, 0.0)
        up += tl.load(place + COLUMNS, is_column, 0.0)
    if PENDING.has_bias:
        gate += read_bias(line, columns, is_column, TYPE)
        up += read_bias(line + FIELDS, columns, is_column, TYPE)
    return activate(gate, up, alpha, limit, ACTIVATION).to(TYPE)


@triton.jit
def activate(gate, up, alpha, limit, ACTIVATION: tl.constexpr):
    """The activated product of gate and up, in float32."""
    if ACTIVATION == "gelu":
        found = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up
    elif ACTIVATION == "swiglu":  # GPT-OSS's
        gate = tl.minimum(gate, limit)
        found = gate * tl.sigmoid(alpha * gate) * (tl.minimum(tl.maximum(up, -limit), limit) + 1.0)
    else:
        if ACTIVATION == "limited_silu":
            gate = tl.minimum(gate, limit)
        gate *= tl.sigmoid(gate)
        if ACTIVATION == "silu_limited":
            gate = tl.minimum(gate, limit)
        if ACTIVATION != "silu":
            up = tl.minimum(tl.maximum(up, -limit), limit)
        found = gate * up
    return found
