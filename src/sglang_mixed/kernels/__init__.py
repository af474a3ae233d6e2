"""Linear kernels whose weights stay in memory as they are in the file: for a CPU here, for a GPU in `grouped/`."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, Mapping
from itertools import chain, islice

import torch

from ..errors import UnsupportedError
from ..formats import ModuleFormat
from .base import Layout, LinearKernel, Tensors, layout_bytes

__all__ = ["KERNELS", "Layout", "LinearKernel", "Tensors", "cpu_kernel", "get_kernel", "pack", "resident_bytes"]

#: name -> module:class, in the order they are asked; chunked takes what the others leave.
KERNELS: dict[str, str] = {
    "plain": "plain:Plain",
    "small": "chunked:Small",
    "int4": "int4:Int4",
    "int8": "int8:Int8",
    "int8_words": "int8_words:Int8Words",
    "fp8": "fp8:FP8",
    "chunked": "chunked:Chunked",
}


@functools.cache
def get_kernel(name: str) -> LinearKernel:
    """The kernel of this name, imported on first use."""
    if name not in KERNELS:
        raise UnsupportedError(f"no kernel {name!r}", rule=f"one of {', '.join(KERNELS)}")
    module, _, kind = KERNELS[name].partition(":")
    return getattr(importlib.import_module(f"{__name__}.{module}"), kind)()  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=65536)
def cpu_kernel(format: ModuleFormat) -> LinearKernel:
    """The first kernel that takes the format; the fallback takes all."""
    return next(_taking(format))


@functools.lru_cache(maxsize=65536)
def resident_bytes(format: ModuleFormat) -> int:
    """Bytes that a weight of this format keeps in memory, exactly."""
    return layout_bytes(cpu_kernel(format).layout(format))


def pack(tensors: Mapping[str, torch.Tensor], format: ModuleFormat) -> tuple[LinearKernel, Tensors]:
    """The first kernel that takes these very tensors (act-order's groups show only in them), and the resident ones."""
    for kernel in chain([cpu_kernel(format)], islice(_taking(format), 1, None)):
        try:
            return kernel, kernel.pack(tensors, format)
        except UnsupportedError:
            continue
    raise AssertionError("the fallback takes all")


def _taking(format: ModuleFormat) -> Iterator[LinearKernel]:
    return (kernel for kernel in map(get_kernel, KERNELS) if kernel.takes(format))
