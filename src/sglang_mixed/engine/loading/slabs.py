"""Page-locked memory through which tensors travel to the GPU, many by one copy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch

#: The strictest alignment of a dtype, and of the processor's copies.
ALIGNMENT = 64


class Slab:
    """Some page-locked memory, as much of a GPU's, and what that still copies between them."""

    def __init__(self, host: torch.Tensor, device: torch.Tensor) -> None:
        self._host, self._device = host, device
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._typed: dict[torch.dtype, tuple[torch.Tensor, torch.Tensor]] = {}
        self._address = host.data_ptr()
        #: Of both sides in their storages, as `as_strided` counts.
        self._begin = host.storage_offset()
        assert device.storage_offset() == self._begin
        self.memory = host.numpy().data

    def __len__(self) -> int:
        """Bytes."""
        return len(self._host)

    def split(self, number: int) -> list[Slab]:
        """So many equal parts, which are slabs themselves."""
        pairs = zip(self._host.chunk(number), self._device.chunk(number), strict=True)
        return [Slab(host, device) for host, device in pairs]

    def wait(self) -> None:
        """Until no copy uses the host's side."""
        self._copied.synchronize()

    def send(self, nbytes: int) -> None:
        """Begin to copy the first bytes to the GPU."""
        self._device[:nbytes].copy_(self._host[:nbytes], non_blocking=True)
        self._copied.record()

    def on_host(self, begin: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor on the host's side."""
        return self._as(dtype)[0].as_strided(shape, _strides(shape), (self._begin + begin) // dtype.itemsize)

    def on_device(self, begin: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The tensor in the same place on the GPU."""
        return self._as(dtype)[1].as_strided(shape, _strides(shape), (self._begin + begin) // dtype.itemsize)

    def twin(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """What the GPU has in the place of a tensor on the host's side; None for one that lies elsewhere."""
        begin = tensor.data_ptr() - self._address
        if tensor.device != self._host.device or not 0 <= begin < len(self):
            return None
        device = self._as(tensor.dtype)[1]
        return device.as_strided(tensor.shape, tensor.stride(), (self._begin + begin) // tensor.itemsize)

    def has_nan(self, nbytes: int) -> torch.Tensor:
        """On the GPU: whether any of the first bytes, which are e4m3 codes, is no number."""
        return ((self._device[:nbytes] & 0x7F) == 0x7F).any()

    def _as(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        if dtype not in self._typed:
            self._typed[dtype] = self._host.view(dtype), self._device.view(dtype)
        return self._typed[dtype]


class Copies:
    """Copies on the GPU that few calls begin."""

    def __init__(self) -> None:
        #: (dtype of the place, of the tensor, whether both are in one piece) -> places and tensors.
        self._alike: dict[tuple[Any, ...], tuple[list[torch.Tensor], list[torch.Tensor]]] = {}

    def add(self, place: torch.Tensor, tensor: torch.Tensor) -> None:
        """One more."""
        is_fast = place.is_contiguous() and tensor.is_contiguous()
        places, tensors = self._alike.setdefault((place.dtype, tensor.dtype, is_fast), ([], []))
        places.append(place)
        tensors.append(tensor)

    def begin(self) -> None:
        """All of them, each kind by one call."""
        for places, tensors in self._alike.values():
            torch._foreach_copy_(places, tensors, non_blocking=True)
        self._alike.clear()


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """uint8 [bytes] of a contiguous tensor."""
    return tensor.reshape(-1).view(torch.uint8)


def lay_out(sizes: Sequence[int]) -> list[int]:
    """Where in a slab tensors of so many bytes begin."""
    return list(itertools.accumulate(map(aligned, sizes[:-1]), initial=0))


def aligned(nbytes: int) -> int:
    """With what fills it up to the next beginning."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
