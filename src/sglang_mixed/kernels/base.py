"""What a linear kernel is: y = x · dequant(W)ᵀ with W in memory as it is in the file.

A kernel keeps *resident* tensors: the checkpoint's own bytes, at most in another order, so that `unpack(pack(t)) == t`
byte for byte and a hash of the file can be checked against memory. Nothing else of a weight outlives a call.
`bias` is the caller's: kernels do not keep it, and some add it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch

from ..formats import ModuleFormat, get_format
from ..formats.base import TORCH_DTYPES, Shape

Layout = dict[str, tuple[torch.dtype, Shape]]
Tensors = dict[str, torch.Tensor]

ALIGNMENT = 64


class LinearKernel(Protocol):
    """One way to run weights of some formats. Implementations are stateless."""

    name: str
    #: Whether `linear` takes a bias [out] as a fourth argument, added before the one rounding to x's dtype.
    takes_bias: bool

    def takes(self, format: ModuleFormat) -> bool:
        """Whether it can run weights of this format, parameters and shape [out, in]."""
        ...

    def layout(self, format: ModuleFormat) -> Layout:
        """The resident tensors, exactly: name -> (dtype, shape)."""
        ...

    def pack(self, tensors: Mapping[str, torch.Tensor], format: ModuleFormat) -> Tensors:
        """Checkpoint tensors -> resident tensors, which keep no larger storage alive.

        Raises FormatError for bytes that contradict the format, UnsupportedError for ones another kernel must take.
        """
        ...

    def unpack(self, resident: Mapping[str, torch.Tensor], format: ModuleFormat) -> Tensors:
        """Resident tensors -> checkpoint tensors, byte for byte, without `bias`."""
        ...

    def linear(
        self, x: torch.Tensor, resident: Mapping[str, torch.Tensor], format: ModuleFormat, *bias: torch.Tensor
    ) -> torch.Tensor:
        """x [rows, in] (bf16, fp16 or fp32) -> [rows, out] in x's dtype; `bias` only where it takes one."""
        ...


class Conversion(NamedTuple):
    """One checkpoint tensor's way to its resident form, for which the weight's others need not be there.

    A kernel offers it as `converts(format) -> Conversion | None`; its `pack` then finds the resident tensor among the
    checkpoint's, in place of the other.
    """

    source: str
    #: Its rows follow those of the weight.
    resident: str
    #: Where a part of the rows may begin: at multiples of it.
    unit: int
    #: (tensor of a part, the part's format, its rows of the resident tensor)
    convert: Callable[[torch.Tensor, ModuleFormat, torch.Tensor], None]


class FileLayout:
    """Base of the kernels that keep the checkpoint's tensors as they are."""

    def layout(self, format: ModuleFormat) -> Layout:
        """The checkpoint's own tensors."""
        return dict(_file_layout(format))

    def pack(self, tensors: Mapping[str, torch.Tensor], format: ModuleFormat) -> Tensors:
        """The same tensors, cut free of the file's buffer."""
        return {name: owned(tensors[name]) for name in self.layout(format)}

    def unpack(self, resident: Mapping[str, torch.Tensor], format: ModuleFormat) -> Tensors:
        """The same tensors."""
        return {name: resident[name] for name in self.layout(format)}


@functools.lru_cache(maxsize=4096)
def _file_layout(format: ModuleFormat) -> Layout:
    specs = get_format(format.name).tensors(format.parameters, format.shape)
    return {
        name: (TORCH_DTYPES[spec.dtypes[0]], spec.shape)
        for name, spec in specs.items()
        if name != "bias" or len(specs) == 1
    }


def layout_bytes(layout: Layout) -> int:
    """Bytes of a layout's tensors."""
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in layout.values())


def owned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself if it is contiguous, aligned and all of its storage; else a copy that is."""
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole and is_aligned(tensor) else tensor.clone(memory_format=torch.contiguous_format)


def is_aligned(tensor: torch.Tensor) -> bool:
    """Contiguous and on a 64-byte boundary: some of torch's kernels read whole vectors and crash otherwise."""
    return tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a contiguous, aligned copy of it."""
    return tensor if is_aligned(tensor) else tensor.clone(memory_format=torch.contiguous_format)
