"""Triton: kernels that are launched while the one ahead of them still runs (programmatic dependent launch)."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def begin(OVERLAPS: tl.constexpr):
    """Wait for the kernel ahead, if this one was launched before its end, and let the next be launched too.

    What stands above this in a kernel may read only what the kernel ahead had waited for itself.
    """
    if OVERLAPS:
        gdc_wait()
        gdc_launch_dependents()
