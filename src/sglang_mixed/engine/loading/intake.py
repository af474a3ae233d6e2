"""Where weights of a layer of ours are delivered: by their checkpoint name, straight into the compressed weight.

SGLang's models find a parameter by name and call its `weight_loader`; what is delivered here never passes through
them. A weight is packed for its kernel as soon as it is complete, while the next one is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ...checkpoint import join
from ...formats.base import TORCH_DTYPES, ModuleFormat
from ...formats.plain import without_bias
from ...formats.slicing import Region, part_bytes, rebase
from ...kernels.compressed import CompressedWeight, NamedPart, compress
from ...plan import Part, PlannedModule
from .. import state
from .ledger import Line


class Place(Protocol):
    """What waits for one tensor."""

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's part of the tensor, as the file holds it."""
        ...

    @property
    def is_implied(self) -> bool:
        """Whether `receive` compares the tensor with what it must be, and so nobody else has to look at it."""
        ...

    def destination(self) -> torch.Tensor | None:
        """Where it can be read to without a copy; None for memory of its own."""
        ...

    def receive(self, tensor: torch.Tensor) -> None:
        """Take this rank's part of the tensor, once."""
        ...


@dataclass(frozen=True, slots=True)
class WeightPlace:
    """A tensor's place in a compressed weight; `format` is the whole module's, `held` what of it this rank holds."""

    weight: CompressedWeight
    part: int
    local: str
    format: ModuleFormat
    held: Region
    is_implied: bool = False

    @property
    def nbytes(self) -> int:
        """As the file holds it."""
        return part_bytes(self.format, self.held)[self.local]

    def destination(self) -> torch.Tensor | None:
        """Its rows of the stacked tensor."""
        return self.weight.destination(self.part, self.local)

    def receive(self, tensor: torch.Tensor) -> None:
        """Hand it on, made to speak of the region."""
        self.weight.receive(self.part, self.local, rebase(self.local, tensor, self.format, self.held))


@dataclass(frozen=True, slots=True)
class Bias:
    """A bias that no parameter of SGLang's holds, this rank's rows of it as in the file."""

    name: str
    tensor: torch.Tensor
    is_implied: bool = False

    def destination(self) -> torch.Tensor:
        """Itself."""
        return self.tensor

    def receive(self, tensor: torch.Tensor) -> None:
        """It was read into place."""
        assert tensor.data_ptr() == self.tensor.data_ptr()

    def restore(self) -> dict[str, torch.Tensor]:
        """Full checkpoint name -> tensor."""
        return {self.name: self.tensor}

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.tensor.nbytes


class Intake:
    """The weights of one layer, each tensor of which arrives once."""

    def __init__(self) -> None:
        self.weights: list[CompressedWeight] = []
        self.biases: list[Bias] = []

    def open(self, modules: Sequence[PlannedModule]) -> list[CompressedWeight]:
        """Expect these modules' tensors; returns the matrices they make, in order."""
        loading, matrices = state.current_loading(), []
        for weight, parts in compress([_named_part(one, loading.plan.parts[one.name]) for one in modules]):
            for index, number in enumerate(parts):
                module = modules[number]
                held = loading.plan.parts[module.name].held
                for local in module.tensors:
                    if local != "bias":
                        weight.expect(index, local)
                        place = WeightPlace(weight, index, local, module.format, held)
                        loading.expect(Line(module.name, None, None, local), join(module.name, local), place)
            matrices.append(weight)
        self.weights += matrices
        return matrices

    def open_bias(self, module: PlannedModule) -> torch.Tensor | None:
        """Expect a module's bias; returns the tensor that it will be read to, None where there is none."""
        if module.bias is None:
            return None
        loading, name = state.current_loading(), join(module.name, "bias")
        begin, end = loading.plan.parts[module.name].wanted.rows
        bias = Bias(name, torch.empty(end - begin, dtype=TORCH_DTYPES[module.bias]))
        loading.expect(Line(module.name, None, None, "bias"), name, bias)
        self.biases.append(bias)
        return bias.tensor


def _named_part(module: PlannedModule, part: Part) -> NamedPart:
    (top, bottom), (left, right) = part.wanted
    rows, columns = part.held
    trim = None if part.held.rows == part.wanted.rows else (top - rows[0], bottom - rows[0])
    return NamedPart(module.name, without_bias(part.format), (left - columns[0], columns[1] - right), trim)
