"""How much of a parameter a loader of SGLang's really fills: each of them cuts and pads in its own way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Written(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of a parameter that this thread writes inside, zeros too; of one place only once."""

    def __init__(self, parameter: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._memory = parameter.untyped_storage().data_ptr()
        self._places: dict[tuple[Any, ...], int] = {}

    @property
    def nbytes(self) -> int:
        """Bytes until now."""
        return sum(self._places.values())

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Note the place that an operator writes to."""
        to = args[0] if args and func._schema.is_mutable else None
        if isinstance(to, torch.Tensor) and to.untyped_storage().data_ptr() == self._memory:
            self._places[to.storage_offset(), to.shape, to.stride()] = to.nbytes
        return func(*args, **(kwargs or {}))
