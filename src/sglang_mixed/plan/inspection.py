"""What one checkpoint is: the format of every module, parameters, bytes, and what is unusual about it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..checkpoint import Checkpoint
from ..errors import FormatError
from ..formats import ModuleFormat, TensorInfo, label_of
from ..formats.base import CACHE_SCALES, tensor_bytes, weight_tensors
from . import size
from .alike import Group, alike
from .families import never_loaded

#: The label of modules that no format explains.
NOT_READ = "not read"


@dataclass(frozen=True, slots=True)
class Kind:
    """Modules of equal tensors and an equal place in the config; `format` is None where `error` says why.

    `is_loaded`: whether an engine loads them; `is_expert`: whether they are routed experts'. Sizes are those of one.
    """

    tensors: dict[str, TensorInfo]
    format: ModuleFormat | None
    error: FormatError | None
    is_loaded: bool
    is_expert: bool
    names: list[str]

    @property
    def label(self) -> str:
        """The format's name for people."""
        return label_of(self.format) if self.format else NOT_READ

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
    groups: dict[tuple[int, int | None, bool, bool], list[str]] = {}
    for name, kind in checkpoint.modules.kinds.items():
        key = kind, checkpoint.rule(name), name not in aside, ".experts." in name
        groups.setdefault(key, []).append(name)
    return [_kind(checkpoint, names, *key[2:]) for key, names in groups.items()]


def rows(found: list[Kind]) -> list[InspectedRow]:
    """The modules of these kinds in a model's order, folded."""
    groups = [
        Group((kind.label, kind.is_loaded), (kind.parameters, kind.file_bytes, kind.resident_bytes), kind.names)
        for kind in found
    ]
    return [
        InspectedRow(row.names, row.key[0], row.key[1], row.number, row.sizes[0], row.sizes[1], row.sizes[2])
        for row in alike(groups)
    ]


def _kind(checkpoint: Checkpoint, names: list[str], is_loaded: bool, is_expert: bool) -> Kind:
    tensors = dict(checkpoint.modules[names[0]])
    try:
        return Kind(tensors, checkpoint.format(names[0]), None, is_loaded, is_expert, names)
    except FormatError as error:
        return Kind(tensors, None, error, is_loaded, is_expert, names)
