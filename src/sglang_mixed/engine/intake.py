"""Where a model's `load_weights` delivers: placeholder parameters that pass each tensor on to its compressed weight.

SGLang's models find a parameter by name and call its `weight_loader`. A layer of ours registers one empty
parameter per tensor name that any of its parts has, and routes by shard and expert. A weight is packed for its
kernel as soon as it is complete, while the next one is read.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..formats.base import ModuleFormat
from ..formats.plain import PlainParameters
from ..kernels.compressed import CompressedWeight, compress
from ..plan import PlannedModule
from . import state
from .ledger import Ledger, Line

#: A slot of a layer: (shard, expert) as SGLang's models name it, and the checkpoint module that fills it.
Slot = tuple[str | int | None, int | None, PlannedModule]


class Intake:
    """The slots of one layer, each tensor of which arrives once."""

    def __init__(self, prefix: str, ledger: Ledger) -> None:
        self.prefix, self._ledger = prefix, ledger
        self.weights: list[CompressedWeight] = []
        self._routes: dict[Line, tuple[CompressedWeight, int]] = {}
        self._placeholders: dict[str, str] = {}

    def open(self, slots: list[Slot], parameter_prefix: str = "") -> list[CompressedWeight]:
        """Expect these slots' tensors; returns the matrices they make, in slot order."""
        matrices = []
        for weight, parts in compress([(module.name, weight_format(module)) for _, _, module in slots]):
            for index, part in enumerate(parts):
                shard, expert, module = slots[part]
                for local in module.tensors:
                    if local != "bias":
                        line = Line(self.prefix, shard, expert, parameter_prefix + local)
                        self._ledger.expect(line)
                        weight.expect(index, local)
                        state.current_loading().places[f"{module.name}.{local}"] = (weight, index, local)
                        self._routes[line] = (weight, index)
                        self._placeholders[parameter_prefix + local] = local
            matrices.append(weight)
        self.weights += matrices
        return matrices

    def register(self, layer: torch.nn.Module) -> None:
        """Give the layer its placeholder parameters."""
        # SGLang's Llama renames every weight_scale_inv to weight_scale before it looks for a parameter.
        aliases = {name.removesuffix("_inv"): name for name in self._placeholders if name.endswith("weight_scale_inv")}
        for name, target in {**aliases, **{name: name for name in self._placeholders}}.items():
            parameter = torch.nn.Parameter(torch.empty(0), requires_grad=False)
            parameter.weight_loader = self._loader(target)  # type: ignore[attr-defined]
            parameter.is_placeholder = True  # type: ignore[attr-defined]
            layer.register_parameter(name, parameter)

    def finish(self, layer: torch.nn.Module) -> None:
        """Drop the placeholders: all weights have arrived."""
        for name, parameter in list(layer.named_parameters(recurse=False)):
            if getattr(parameter, "is_placeholder", False):
                delattr(layer, name)
        self._placeholders.clear()
        self._routes.clear()

    def _loader(self, parameter: str) -> Any:
        def load(
            param: torch.nn.Parameter,
            loaded_weight: torch.Tensor,
            name_or_shard: str | int | None = None,
            shard_id: str | int | None = None,
            expert_id: int | None = None,
        ) -> None:
            # Linear layers are called (param, weight, shard); FusedMoE (param, weight, name, shard_id=, expert_id=).
            shard = name_or_shard if expert_id is None and shard_id is None else shard_id
            line = Line(self.prefix, shard, expert_id, parameter)
            self._ledger.arrive(line)
            weight, part = self._routes[line]
            weight.receive(part, self._placeholders[parameter], loaded_weight)

        return load


def weight_format(module: PlannedModule) -> ModuleFormat:
    """The module's format without its bias, which SGLang keeps in a parameter of its own."""
    parameters = module.format.parameters
    if not isinstance(parameters, PlainParameters) or "bias" not in parameters.names:
        return module.format
    names = tuple(name for name in parameters.names if name != "bias")
    others = tuple(other for other in parameters.others if other[0] != "bias")
    return replace(module.format, parameters=PlainParameters(parameters.dtype, names, others))
