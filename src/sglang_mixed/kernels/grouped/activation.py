"""Triton: what stands between a layer's first two products and its last."""

from __future__ import annotations

import triton
import triton.language as tl


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
