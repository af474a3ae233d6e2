"""What one checkpoint is: the format of every module, parameters, bytes, and what is unusual about it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ..checkpoint import Checkpoint
from ..errors import FormatError
from ..formats import ModuleFormat, TensorInfo, get_format
from ..formats.base import CACHE_SCALES, tensor_bytes, weight_tensors
from . import size
from .alike import alike
from .families import model_order, never_loaded

#: The label of modules that no format explains.
NOT_READ = "not read"


@dataclass(frozen=True, slots=True)
class Kind:
    """Modules of equal tensors and an equal place in the config; `format` is None where `error` says why.

    `is_loaded`: whether an engine loads them. Sizes are those of one module.
    """

    tensors: dict[str, TensorInfo]
    format: ModuleFormat | None
    error: FormatError | None
    is_loaded: bool
    names: list[str]

    @property
    def label(self) -> str:
        """The format's name for people."""
        return get_format(self.format.name).label(self.format.parameters) if self.format else NOT_READ

    @property
    def parameters(self) -> int:
        """Weights, and values of a bias; 0 for what is not read, or is no weight."""
        return size.in_16_bits(self.format) // 2 + self._bias_values if self.format and self.is_weight else 0

    @property
    def file_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(map(tensor_bytes, self.tensors.values()))

    @property
    def resident_bytes(self) -> int:
        """Bytes in an engine's memory."""
        if not self.format or not self.is_loaded or not self.is_weight:
            return 0
        return size.resident(self.format) + self._bias_values * size.item_bytes(self._bias)

    @property
    def is_weight(self) -> bool:
        """Whether there is more than scales of a key-value cache."""
        return not self.tensors.keys() <= CACHE_SCALES

    @property
    def _bias(self) -> str | None:
        bias = weight_tensors(self.tensors).get("bias") if len(self.tensors) > 1 else None
        return bias.dtype if bias else None

    @property
    def _bias_values(self) -> int:
        return math.prod(self.tensors["bias"].shape) if self._bias else 0


@dataclass(frozen=True, slots=True)
class InspectedRow:
    """Modules that are alike, for a table."""

    modules: str
    format: str
    is_loaded: bool
    count: int
    parameters: int
    file_bytes: int
    resident_bytes: int


def kinds(checkpoint: Checkpoint) -> list[Kind]:
    """All modules, grouped; each group's format is detected once."""
    aside = never_loaded(checkpoint.modules, checkpoint.config)
    groups: dict[tuple[int, int, bool], list[str]] = {}
    for name, kind in checkpoint.modules.kinds.items():
        groups.setdefault((kind, checkpoint.rule(name), name in aside), []).append(name)
    return [_kind(checkpoint, names, not is_aside) for (_, _, is_aside), names in groups.items()]


def rows(found: list[Kind]) -> list[InspectedRow]:
    """The modules of these kinds in a model's order, folded."""
    ordered = sorted(alike(_measured(found)), key=lambda row: int(row.key[0]))
    return [InspectedRow(row.names, row.key[1], row.key[2], row.number, *row.sizes) for row in ordered]


def _measured(found: list[Kind]) -> Iterator[tuple[str, tuple[int, str, bool], tuple[int, ...]]]:
    for kind in found:
        label, sizes = kind.label, (kind.parameters, kind.file_bytes, kind.resident_bytes)
        for name in kind.names:
            yield name, (model_order(name), label, kind.is_loaded), sizes


def _kind(checkpoint: Checkpoint, names: list[str], is_loaded: bool) -> Kind:
    tensors = dict(checkpoint.modules[names[0]])
    try:
        return Kind(tensors, checkpoint.format(names[0]), None, is_loaded, names)
    except FormatError as error:
        return Kind(tensors, None, error, is_loaded, names)
