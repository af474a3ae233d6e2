"""One matrix as it lies in memory: received tensor by tensor, packed for its kernel, restorable byte for byte."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..formats.base import ModuleFormat
from ..formats.fusion import fuse, stack, unstack
from . import LinearKernel, pack

#: A checkpoint module and the format this rank holds it in.
NamedPart = tuple[str, ModuleFormat]


class CompressedWeight:
    """A checkpoint module's weight [out, in], or several modules' stacked along `out`, compressed at rest."""

    def __init__(self, parts: Sequence[NamedPart]) -> None:
        self.names = tuple(name for name, _ in parts)
        self.formats = tuple(part for _, part in parts)
        fused = fuse(self.formats)
        assert fused is not None, "parts of one CompressedWeight must be fusable"
        self.format = fused
        self.kernel: LinearKernel
        self.resident: dict[str, torch.Tensor] = {}
        self._pending: list[dict[str, torch.Tensor]] = [{} for _ in parts]

    def receive(self, part: int, local: str, tensor: torch.Tensor) -> None:
        """Keep one checkpoint tensor of one part (by reference)."""
        self._pending[part][local] = tensor

    def pack(self) -> None:
        """Turn what was received into what the kernel reads; nothing of the former is kept."""
        self.kernel, self.resident = pack(stack(self._pending, self.formats), self.format)
        self._pending = []

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, in] -> [rows, out]."""
        return self.kernel.linear(x, self.resident, self.format)

    def restore(self) -> dict[str, torch.Tensor]:
        """Full checkpoint name -> tensor, byte for byte as the files hold them."""
        parts = unstack(self.kernel.unpack(self.resident, self.format), self.formats)
        return {
            f"{name}.{local}": tensor
            for name, part in zip(self.names, parts, strict=True)
            for local, tensor in part.items()
        }

    @property
    def nbytes(self) -> int:
        """Bytes of memory this weight occupies, measured on the storages."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.resident.values()}
        return sum(storages.values())


def compress(parts: Sequence[NamedPart]) -> list[tuple[CompressedWeight, range]]:
    """As few matrices as the formats allow: all parts as one, or one each. The range tells which parts each holds."""
    if fuse([part for _, part in parts]) is not None:
        return [(CompressedWeight(parts), range(len(parts)))]
    return [(CompressedWeight([part]), range(index, index + 1)) for index, part in enumerate(parts)]
