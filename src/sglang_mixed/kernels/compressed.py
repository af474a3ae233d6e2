"""One matrix as it lies in memory: received tensor by tensor, packed for its kernel, restorable byte for byte."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..formats import get_format, tensor_specs
from ..formats.base import TORCH_DTYPES, ModuleFormat
from ..formats.fusion import fuse, out_axis, stack_common, unstack
from . import LinearKernel, pack


class NamedPart(NamedTuple):
    """A checkpoint module and the format this rank holds it in.

    `pad`: zeros that x needs before and after its columns, `trim`: the rows [begin, end) of the product that are
    wanted, where the rank holds whole units of more columns or rows than its layer has.
    """

    name: str
    format: ModuleFormat
    pad: tuple[int, int] = (0, 0)
    trim: tuple[int, int] | None = None


class CompressedWeight:
    """A checkpoint module's weight [out, in], or several modules' stacked along `out`, compressed at rest."""

    def __init__(self, parts: Sequence[NamedPart]) -> None:
        self.names = tuple(part.name for part in parts)
        self.formats = tuple(part.format for part in parts)
        self._pad, self._trim = parts[0].pad, parts[0].trim
        assert len(parts) == 1 or not any(any(part.pad) or part.trim for part in parts)
        fused = fuse(self.formats)
        assert fused is not None, "parts of one CompressedWeight must be fusable"
        self.format = fused
        self.kernel: LinearKernel
        self.resident: dict[str, torch.Tensor] = {}
        self._stacked: dict[str, torch.Tensor] = {}
        self._missing: set[tuple[int, str]] = set()
        self._pending: list[dict[str, torch.Tensor]] = [{} for _ in parts]

    def expect(self, part: int, local: str) -> None:
        """One more tensor will be received."""
        self._missing.add((part, local))
        if len(self.names) > 1 and local not in self._stacked:
            spec = tensor_specs(self.format)[local]
            if out_axis(spec) is not None:
                self._stacked[local] = torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtypes[0]])

    def destination(self, part: int, local: str) -> torch.Tensor | None:
        """Where a tensor may be read to directly: its part of the stacked one. None if it must be received as it is."""
        stacked = self._stacked.get(local)
        if stacked is None:
            return None
        spec = tensor_specs(self.format)[local]
        axis = out_axis(spec)
        assert axis is not None
        unit, before = spec.axes[axis], sum(one.shape[0] for one in self.formats[:part])
        return stacked.narrow(axis, unit.length(before), unit.length(self.formats[part].shape[0]))

    def receive(self, part: int, local: str, tensor: torch.Tensor) -> None:
        """Take one checkpoint tensor of one part; the last one turns all into what the kernel reads."""
        place = self.destination(part, local)
        if place is None:
            self._pending[part][local] = tensor
        elif place.data_ptr() != tensor.data_ptr():
            place.copy_(tensor)
        self._missing.remove((part, local))
        if not self._missing:
            common = stack_common(self._pending, self.formats) if self._stacked else self._pending[0]
            tensors = {**common, **self._stacked}
            self.kernel, self.resident = pack(tensors, self.format)
            self._pending, self._stacked = [], {}

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


def compress(parts: Sequence[NamedPart]) -> list[tuple[CompressedWeight, range]]:
    """As few matrices as the formats allow: neighbours that agree are one. The range tells which parts each holds."""
    found, begin = [], 0
    for end in range(1, len(parts) + 1):
        if end == len(parts) or not _are_one(parts[begin : end + 1]):
            found.append((CompressedWeight(parts[begin:end]), range(begin, end)))
            begin = end
    return found


def _are_one(parts: Sequence[NamedPart]) -> bool:
    return not any(any(part.pad) or part.trim for part in parts) and fuse([part.format for part in parts]) is not None
