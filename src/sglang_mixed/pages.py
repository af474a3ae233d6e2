"""Memory that is about to be filled."""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable

import torch

#: Of Linux 5.14; Python has no name for it.
MADV_POPULATE_WRITE = 23
#: Fewer bytes are not worth the call.
LEAST = 64 << 10


def populate(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, whose memory has its pages now if it is contiguous host memory; else they come at the first write.

    The first write to a page interrupts its writer, every 4 KiB. Pages that are asked for together cost a fifth less.
    """
    if tensor.nbytes >= LEAST and tensor.device.type == "cpu" and tensor.is_contiguous():
        begin = tensor.data_ptr()
        first = begin - begin % mmap.PAGESIZE
        # What is refused is done at the first write, which tells of memory that there is not.
        _madvise()(first, begin + tensor.nbytes - first, MADV_POPULATE_WRITE)
    return tensor


@functools.cache
def _madvise() -> Callable[[int, int, int], int]:
    if sys.platform != "linux":
        return lambda address, length, advice: -1
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
