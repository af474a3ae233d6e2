"""Bytes of one module's weight: in memory, in the file, in 16 bits."""

from __future__ import annotations

import math

from ..formats import ModuleFormat, nbytes
from ..formats.base import ITEM_BYTES


def resident(module_format: ModuleFormat) -> int:
    """Bytes that the kernel of this format keeps, without a bias."""
    from ..kernels import resident_bytes

    return resident_bytes(module_format)


def stored(module_format: ModuleFormat) -> int:
    """Bytes in the file, without a bias."""
    return nbytes(module_format)


def in_16_bits(module_format: ModuleFormat) -> int:
    """Bytes of the weight at two a value; a plain module's other tensors (but its bias) count likewise."""
    values = math.prod(module_format.shape)
    if module_format.name == "plain":
        values += sum(math.prod(shape) for name, _, shape in module_format.parameters.others if name != "bias")
    return 2 * values


def item_bytes(dtype: str | None) -> int:
    """Bytes of one value of a safetensors dtype."""
    return ITEM_BYTES[dtype] if dtype else 0
