"""A torch module while it is filled: planned tensors come in, compressed modules take the place of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ..checkpoint import Read, join
from ..formats.plain import without_bias
from ..kernels.compressed import CompressedWeight, NamedPart, compress
from ..plan import PlannedModule
from .cache import DequantizationCache
from .experts import ExpertWeights, MixedPrecisionExperts, activation_of
from .layout import Layout
from .linear import MixedPrecisionLinear
from .matrix import CompressedMatrix

Places = dict[str, tuple[CompressedWeight, int, str]]


@dataclass(slots=True)
class Filling:
    """Parts of a model that wait for their tensors. `casts`: parameter -> "file dtype -> dtype" that the model holds.

    What is replaced loses its own weights at once, so that a model with real weights is not in memory twice.
    """

    model: torch.nn.Module
    layout: Layout
    dtype: torch.dtype
    cache: DequantizationCache | None
    casts: dict[str, str] = field(default_factory=dict)
    _keeps_float32: set[str] = field(default_factory=set)
    _places: Places = field(default_factory=dict)
    _loose: dict[str, torch.Tensor] = field(default_factory=dict)
    _build: list[Callable[[], None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._keeps_float32 = float32_on_purpose(self.model)
        for name, module in self.layout.linears.items():
            self._open_linear(name, module)
        for name, experts in self.layout.experts.items():
            self._open_experts(name, experts)

    def destination(self, read: Read) -> torch.Tensor | None:
        """Where a tensor is read to (see `stream`)."""
        if read.name not in self._places:
            return None
        weight, part, local = self._places[read.name]
        return weight.destination(part, local)

    def receive(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor."""
        if name in self._places:
            weight, part, local = self._places[name]
            weight.receive(part, local, tensor)
        else:
            self._loose[name] = tensor

    def finish(self) -> None:
        """Put everything into the model."""
        for build in self._build:
            build()
        for name, (module, local) in self.layout.tensors.items():
            self._set(name, self._cast(name, self._loose[join(module.name, local)]))
        for name, other in self.layout.tied.items():
            self._set(name, self.model.get_parameter(other))

    def _open_linear(self, name: str, module: PlannedModule) -> None:
        ((weight, _),) = self._open([module])
        self.model.get_submodule(name).register_parameter("weight", None)

        def build() -> None:
            bias = self._bias(module)
            linear = MixedPrecisionLinear(_matrix(weight), bias, self.cache)
            self.model.set_submodule(name, linear)

        self._build.append(build)

    def _open_experts(self, name: str, experts: Sequence[Sequence[PlannedModule]]) -> None:
        opened = [([one for one, _ in self._open(expert[:2])], self._open(expert[2:])[0][0]) for expert in experts]
        original = self.model.get_submodule(name)
        activate = activation_of(original)
        for local, _ in list(original.named_parameters(recurse=False)):
            original.register_parameter(local, None)

        def build() -> None:
            weights = [
                ExpertWeights(
                    [_matrix(one) for one in gate_up],
                    _matrix(down),
                    [bias for module in expert if (bias := self._bias(module)) is not None],
                )
                for (gate_up, down), expert in zip(opened, experts, strict=True)
            ]
            self.model.set_submodule(name, MixedPrecisionExperts(weights, activate, self.cache))

        self._build.append(build)

    def _open(self, modules: Sequence[PlannedModule]) -> list[tuple[CompressedWeight, range]]:
        found = compress([NamedPart(module.name, without_bias(module.format)) for module in modules])
        for weight, parts in found:
            for index, number in enumerate(parts):
                module = modules[number]
                for local in module.tensors:
                    if local != "bias":
                        weight.expect(index, local)
                        self._places[join(module.name, local)] = weight, index, local
        return found

    def _bias(self, module: PlannedModule) -> torch.Tensor | None:
        name = join(module.name, "bias")
        return self._cast(name, self._loose[name]) if "bias" in module.tensors else None

    def _cast(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        stored = tensor.dtype
        if not stored.is_floating_point or (stored == torch.float32 and name in self._keeps_float32):
            return tensor
        if stored != self.dtype:
            self.casts[name] = f"{_text(stored)} -> {_text(self.dtype)}"
        return tensor.to(self.dtype)

    def _set(self, name: str, tensor: torch.Tensor) -> None:
        owner, _, local = name.rpartition(".")
        module = self.model.get_submodule(owner)
        if local in module._buffers:
            module._buffers[local] = tensor
            return
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        setattr(module, local, tensor if is_parameter else torch.nn.Parameter(tensor, requires_grad=False))


def float32_on_purpose(model: torch.nn.Module) -> set[str]:
    """Names of what a model keeps in float32 whatever its dtype is: by its own list, or unlike all else in it."""
    marks: list[str] = []
    for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        marks += getattr(model, attribute, None) or ()
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    dtypes = Counter(one.dtype for one in model.parameters() if one.is_floating_point())
    usual = dtypes.most_common(1)[0][0] if dtypes else torch.float32
    return {
        name
        for name, tensor in tensors.items()
        if tensor.dtype == torch.float32 and (usual != torch.float32 or any(mark in name for mark in marks))
    }


def _matrix(weight: CompressedWeight) -> CompressedMatrix:
    return CompressedMatrix(weight.kernel, weight.format, weight.resident)


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
