"""Weights on an accelerator as their files hold them, until SGLang's kernels take them over in their own layout.

In between the proof hashes them. A tensor finds its place by its checkpoint name; SGLang's models never see it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ...checkpoint import join
from ...errors import InconsistentFormatError, LedgerError
from ...formats import ModuleFormat, tensor_specs
from ...formats.base import TORCH_DTYPES, Shape
from ...formats.fusion import out_axis
from ...formats.slicing import Region, rebase, tensor_ranges
from ...kernels.implied import implied, without_implied
from ...plan import Part, PlannedModule
from ...plan.values import check_planned
from .. import state
from .kernel_builds import Kernel
from .ledger import Line
from .transfer import Transfer

Tensors = dict[str, torch.Tensor]
Index = tuple[int | slice, ...]


@functools.cache
def _nothing(dtype: torch.dtype) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.empty(0, dtype=dtype, device="cpu"), requires_grad=False)


@dataclass(slots=True)
class StockTensor:
    """This rank's part of a file tensor inside a parameter; the engine may hold it in another dtype than the file."""

    parameter: torch.nn.Parameter
    index: Index
    shape: Shape
    stored: torch.dtype

    def restore(self) -> torch.Tensor:
        """The part as it lies in memory, without padding, in the shape that was read."""
        return self.parameter.data[self.index].reshape(self.shape)

    @property
    def is_cast(self) -> bool:
        """Whether the engine holds another dtype than the file."""
        return self.parameter.dtype != self.stored

    @property
    def held_as(self) -> str:
        """torch's name of the dtype it is held in."""
        return str(self.parameter.dtype).removeprefix("torch.")

    @property
    def nbytes(self) -> int:
        """Bytes of the part in the file, or in memory where the engine holds it in a narrower dtype."""
        return math.prod(self.shape) * min(self.stored.itemsize, self.parameter.dtype.itemsize)

    def release(self) -> None:
        """Keep the parameter alive no longer: kernels have taken over what it held."""
        self.parameter = _nothing(self.parameter.dtype)


class Whole:
    """The file tensors that one parameter is made of: each has its place to itself, so it is complete with its arrival.

    One that went elsewhere as well would have filled more bytes than its own, which the ledger refuses.
    """

    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer
        #: Numbers that places begin with, such as an expert's -> tensors there, and the slices that follow.
        self._places: dict[Index, list[tuple[str, Index]]] = {}

    def arrive(self, name: str, tensor: StockTensor) -> None:
        """A tensor has been copied to its place, or will be. Raises LedgerError if another was before."""
        first = next((dim for dim, one in enumerate(tensor.index) if isinstance(one, slice)), len(tensor.index))
        others, own = self._places.setdefault(tensor.index[:first], []), tensor.index[first:]
        for other, place in others:
            if all(map(_meet, own, place)):
                raise LedgerError(
                    f"{other} and {name} have one place in the model",
                    tensor=name,
                    rule="a weight fills every byte of its place, and no other",
                )
        others.append((name, own))
        self._transfer.complete(name, tensor.restore())


def _meet(one: int | slice, other: int | slice) -> bool:
    """Whether two slices of one dimension have anything in common."""
    assert isinstance(one, slice) and isinstance(other, slice)
    if one == slice(None) or other == slice(None):
        return True
    return bool(one.start < other.stop and other.start < one.stop)


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where one file tensor goes (see `intake.Place`); `part` is what this rank holds of the module."""

    whole: Whole
    module: PlannedModule
    local: str
    part: Part
    tensor: StockTensor
    #: Whether the format says what the tensor must be.
    is_implied: bool = False

    @property
    def nbytes(self) -> int:
        """As the file holds it."""
        return math.prod(self.tensor.shape) * self.tensor.stored.itemsize

    def destination(self) -> torch.Tensor | None:
        """Files are read to host memory first."""
        return None

    def receive(self, tensor: torch.Tensor) -> None:
        """Copy this rank's part, as read. Kernels leave out what the format implies: it must be that."""
        if self.is_implied:
            found = rebase(self.local, tensor.cpu(), self.module.format, self.part.held)
            try:
                without_implied({**implied(self.part.format), self.local: found}, self.part.format)
            except InconsistentFormatError:
                check_planned(
                    state.current_loading().plan.plan, join(self.module.name, self.local), tensor, everything=False
                )  # may say more
                raise
        place = self.tensor.parameter.data[self.tensor.index]
        state.current_loading().transfer.copy(place, tensor.reshape(place.shape))
        self.whole.arrive(join(self.module.name, self.local), self.tensor)


class FileTensors(torch.nn.Module):
    """Matrices of one format, each made of the same parts stacked along their outputs.

    One parameter per local name, [matrices, ...stacked tensor]; a tensor without an "out" axis keeps one entry a part:
    [matrices, parts, ...]. Of every module a *room*, a region of whole blocks and groups that may reach beyond the
    module, has its place; what is not read of it stays zero.
    """

    def __init__(
        self, matrices: Sequence[Sequence[PlannedModule]], rooms: Sequence[Region], plain_dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.tensors: dict[str, StockTensor] = {}
        self._implied: set[str] = set()
        for local in (name for name in matrices[0][0].tensors if name != "bias"):
            shape, offsets = _stacked(local, [module.format for module in matrices[0]], rooms)
            dtype = file_dtype(matrices[0][0].format, local, plain_dtype)
            parameter = torch.nn.Parameter(torch.zeros(len(matrices), *shape, dtype=dtype), requires_grad=False)
            self.register_parameter(local, parameter)
            whole = Whole(state.current_loading().transfer)
            for number, parts in enumerate(matrices):
                for module, room, offset in zip(parts, rooms, offsets, strict=True):
                    self._expect(whole, module, local, room, parameter, (number, *offset))

    def take(self) -> Tensors:
        """Local name -> its tensor, which is not kept here any longer."""
        taken = {name: parameter.data for name, parameter in self.named_parameters(recurse=False)}
        self._parameters.clear()
        for tensor in self.tensors.values():
            tensor.release()
        return taken

    @property
    def held_bytes(self) -> int:
        """Bytes of the files' tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def kept_bytes(self) -> int:
        """Bytes of those that a kernel keeps in some form: formats imply the others."""
        return sum(tensor.nbytes for name, tensor in self.tensors.items() if name not in self._implied)

    def _expect(
        self,
        whole: Whole,
        module: PlannedModule,
        local: str,
        room: Region,
        parameter: torch.nn.Parameter,
        before: Index,
    ) -> None:
        part = state.current_loading().plan.parts[module.name]
        name, index = join(module.name, local), list(before)
        here, there = tensor_ranges(module.format, part.held)[local], tensor_ranges(module.format, room)[local]
        first = len(index) - len(here)
        for dim, ((begin, end), (origin, _)) in enumerate(zip(here, there, strict=True), first):
            place = index[dim]
            assert isinstance(place, slice)
            index[dim] = slice(place.start + begin - origin, place.start + end - origin)
        shape = tuple(end - begin for begin, end in here)
        tensor = StockTensor(parameter, tuple(index), shape, file_dtype(module.format, local))
        self.tensors[name] = tensor
        is_implied = local in implied(part.format)
        if is_implied:
            self._implied.add(name)
        waiting = TensorPlace(whole, module, local, part, tensor, is_implied)
        state.current_loading().expect(Line(module.name, None, None, local), name, waiting)


class Converted(torch.nn.Module):
    """A module whose weights arrive as file tensors and end as a kernel's."""

    def __init__(self) -> None:
        super().__init__()
        self._padding: int | None = None

    @property
    def files(self) -> list[FileTensors]:
        """What the files are read to."""
        return [module for module in self.children() if isinstance(module, FileTensors)]

    @property
    def padding(self) -> int:
        """Bytes of this module that hold no weight: rows that fill up a unit, and what a wider dtype adds."""
        if self._padding is not None:
            return self._padding
        held = sum(files.held_bytes for files in self.files)
        return sum(parameter.nbytes for parameter in self.parameters()) - held

    @property
    def compiled(self) -> set[Kernel]:
        """What SGLang compiles at the first call for this module's weights."""
        return set()

    def adopt(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Register a kernel's tensors as parameters."""
        for name, tensor in tensors.items():
            self.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))

    def note_padding(self) -> None:
        """All parameters are a kernel's now."""
        kept = sum(files.kept_bytes for files in self.files)
        self._padding = sum(parameter.nbytes for parameter in self.parameters()) - kept


def file_dtype(module_format: ModuleFormat, local: str, plain_dtype: torch.dtype | None = None) -> torch.dtype:
    """The dtype of a tensor in the file; plain weights are held in the engine's dtype where that is given."""
    if module_format.name == "plain" and plain_dtype is not None:
        return plain_dtype
    return TORCH_DTYPES[tensor_specs(module_format)[local].dtypes[0]]


def _stacked(local: str, formats: Sequence[ModuleFormat], rooms: Sequence[Region]) -> tuple[Shape, list[Index]]:
    """The shape of a stacked tensor, and where each part's room lies in it."""
    axis = out_axis(tensor_specs(formats[0])[local])
    sizes = [
        tuple(end - begin for begin, end in tensor_ranges(one, room)[local])
        for one, room in zip(formats, rooms, strict=True)
    ]
    if axis is None:
        places: list[Index] = [(part, *(slice(0, n) for n in size)) for part, size in enumerate(sizes)]
        return (len(sizes), *sizes[0]), places
    offsets: list[Index] = []
    begin = 0
    for size in sizes:
        starts = [begin if dim == axis else 0 for dim in range(len(size))]
        offsets.append(tuple(slice(start, start + n) for start, n in zip(starts, size, strict=True)))
        begin += size[axis]
    return (*sizes[0][:axis], begin, *sizes[0][axis + 1 :]), offsets
