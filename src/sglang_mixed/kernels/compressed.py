"""One matrix as it lies in memory: received tensor by tensor, packed for its kernel, restorable byte for byte."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..formats import get_format, tensor_specs
from ..formats.base import TORCH_DTYPES, Axis, ModuleFormat, Shape, TensorSpec
from ..formats.fusion import fuse, out_axis, stack_common, unstack
from ..pages import populate
from . import Layout, LinearKernel, cpu_kernel, pack
from .base import Conversion


class NamedPart(NamedTuple):
    """A checkpoint module and the format this rank holds it in.

    `pad`: zeros that x needs before and after its columns, `trim`: the rows [begin, end) of the product that are
    wanted, where the rank holds whole units of more columns or rows than its layer has.
    """

    name: str
    format: ModuleFormat
    pad: tuple[int, int] = (0, 0)
    trim: tuple[int, int] | None = None


class _Slot(NamedTuple):
    """Where one checkpoint tensor of one part goes: a run of `whole`'s dimension, by `convert` where it is given."""

    whole: str
    axis: int
    begin: int
    length: int
    spec: TensorSpec
    convert: Callable[[torch.Tensor, ModuleFormat, torch.Tensor], None] | None = None


@dataclass(frozen=True, slots=True)
class _Stack:
    """Formats as one weight: their fused format, and the slots of the tensors that do not wait for all others."""

    format: ModuleFormat
    slots: Mapping[tuple[int, str], _Slot]
    #: Name -> dtype and shape of the tensors that the slots are parts of.
    wholes: Layout


class CompressedWeight:
    """A checkpoint module's weight [out, in], or several modules' stacked along `out`, compressed at rest."""

    def __init__(self, parts: Sequence[NamedPart]) -> None:
        self.names = tuple(part.name for part in parts)
        self.formats = tuple(part.format for part in parts)
        self._pad, self._trim = parts[0].pad, parts[0].trim
        assert len(parts) == 1 or not any(any(part.pad) or part.trim for part in parts)
        stack = _stack(self.formats)
        assert stack is not None, "parts of one CompressedWeight must be fusable"
        self.format, self._slots, self._wholes = stack.format, stack.slots, stack.wholes
        self.kernel: LinearKernel
        self.resident: dict[str, torch.Tensor] = {}
        self._whole: dict[str, torch.Tensor] = {}
        self._missing: set[tuple[int, str]] = set()
        self._pending: list[dict[str, torch.Tensor]] = [{} for _ in parts]
        self._completing = threading.Lock()

    def expect(self, part: int, local: str) -> None:
        """One more tensor will be received."""
        self._missing.add((part, local))
        slot = self._slots.get((part, local))
        if slot and slot.whole not in self._whole:
            dtype, shape = self._wholes[slot.whole]
            self._whole[slot.whole] = torch.empty(shape, dtype=dtype)

    def destination(self, part: int, local: str) -> torch.Tensor | None:
        """Where a tensor may be read to directly, to be received next by the same thread.

        Its part of the stacked one, or memory that is lent until then. None if it must have memory of its own.
        """
        slot = self._slots.get((part, local))
        if slot is None:
            return None
        if slot.convert:
            return _lent(slot.spec.shape, TORCH_DTYPES[slot.spec.dtypes[0]])
        return populate(self._place(slot))

    def _place(self, slot: _Slot) -> torch.Tensor:
        return self._whole[slot.whole].narrow(slot.axis, slot.begin, slot.length)

    def receive(self, part: int, local: str, tensor: torch.Tensor) -> None:
        """Take one checkpoint tensor of one part; the last one turns all into what the kernel reads.

        Threads may bring tensors side by side.
        """
        slot = self._slots.get((part, local))
        if slot is None:
            self._pending[part][local] = tensor
        else:
            whole = self._whole[slot.whole]
            if slot.convert:
                slot.convert(tensor, self.formats[part], populate(self._place(slot)))
            elif tensor.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
                self._place(slot).copy_(tensor)
        with self._completing:
            self._missing.remove((part, local))
            is_last = not self._missing
        if is_last:
            common = stack_common(self._pending, self.formats) if len(self.names) > 1 else self._pending[0]
            self.kernel, self.resident = pack({**common, **self._whole}, self.format)
            self._pending, self._whole = [], {}

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [rows, in] -> [rows, out], plus a bias [out]."""
        if any(self._pad):
            x = F.pad(x, self._pad)
        if bias is not None and self._trim is None and self.kernel.takes_bias:
            return self.kernel.linear(x, self.resident, self.format, bias)
        y = self.kernel.linear(x, self.resident, self.format)
        y = y if self._trim is None else y[:, slice(*self._trim)]
        return y if bias is None else y + bias

    @property
    def rows(self) -> int:
        """Rows of the product."""
        return self.format.shape[0] if self._trim is None else self._trim[1] - self._trim[0]

    def restore(self) -> dict[str, torch.Tensor]:
        """Full checkpoint name -> tensor, byte for byte as the files hold them."""
        parts = unstack(self.kernel.unpack(self.resident, self.format), self.formats)
        return {
            f"{name}.{local}": tensor
            for name, part in zip(self.names, parts, strict=True)
            for local, tensor in part.items()
        }

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The whole weight [out, in] by the format's reference, without what only fills its units."""
        tensors = self.kernel.unpack(self.resident, self.format)
        weight = get_format(self.format.name).dequantize(tensors, self.format.parameters, dtype)
        rows, (before, after) = self._trim or (0, len(weight)), self._pad
        return weight[slice(*rows), before : weight.shape[1] - after]

    @property
    def nbytes(self) -> int:
        """Bytes of memory this weight occupies, measured on the storages."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.resident.values()}
        return sum(storages.values())


@functools.lru_cache(maxsize=65_536)
def _stack(formats: tuple[ModuleFormat, ...]) -> _Stack | None:
    """None where the formats cannot be one weight."""
    fused = fuse(formats)
    if fused is None:
        return None
    begins = list(accumulate((one.shape[0] for one in formats), initial=0))
    conversion = _conversion(fused, begins[:-1])
    slots: dict[tuple[int, str], _Slot] = {}
    wholes: Layout = {}
    for local, spec in tensor_specs(fused).items():
        axis = out_axis(spec)
        if conversion and local == conversion.source:
            name, convert, axis, unit = conversion.resident, conversion.convert, 0, Axis("out")
            wholes[name] = cpu_kernel(fused).layout(fused)[name]
        elif len(formats) > 1 and axis is not None:
            name, convert, unit = local, None, spec.axes[axis]
            wholes[name] = TORCH_DTYPES[spec.dtypes[0]], spec.shape
        else:
            continue
        for part, (begin, one) in enumerate(zip(begins, formats, strict=False)):
            length = unit.length(one.shape[0])
            slots[part, local] = _Slot(name, axis, unit.length(begin), length, tensor_specs(one)[local], convert)
    return _Stack(fused, slots, wholes)


def _conversion(format: ModuleFormat, begins: Sequence[int]) -> Conversion | None:
    """How a tensor reaches its resident form before the others are there; None where it does not."""
    converts = getattr(cpu_kernel(format), "converts", None)
    conversion: Conversion | None = converts(format) if converts else None
    return conversion if conversion and not any(row % conversion.unit for row in begins) else None


_memory = threading.local()


def _lent(shape: Shape, dtype: torch.dtype) -> torch.Tensor:
    """Memory of this thread for one tensor at a time: fresh memory costs more than what is done with it."""
    nbytes = math.prod(shape) * dtype.itemsize
    if getattr(_memory, "buffer", _NOTHING).nbytes < nbytes:
        _memory.buffer = torch.empty(nbytes, dtype=torch.uint8)
    buffer: torch.Tensor = _memory.buffer
    return buffer[:nbytes].view(dtype).view(shape)


_NOTHING = torch.empty(0)


def compress(parts: Sequence[NamedPart]) -> list[tuple[CompressedWeight, range]]:
    """As few matrices as the formats allow: neighbours that agree are one. The range tells which parts each holds."""
    found, begin = [], 0
    for end in range(1, len(parts) + 1):
        if end == len(parts) or not _are_one(parts[begin : end + 1]):
            found.append((CompressedWeight(parts[begin:end]), range(begin, end)))
            begin = end
    return found


def _are_one(parts: Sequence[NamedPart]) -> bool:
    return not any(any(part.pad) or part.trim for part in parts) and _stack(tuple(p.format for p in parts)) is not None
