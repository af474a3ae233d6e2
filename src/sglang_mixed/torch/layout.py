"""Which part of a torch module each planned module becomes. Everything is checked before a weight is read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..errors import CoverageError, ShapeError, UnsupportedError
from ..formats import tensor_specs
from ..plan import Plan, PlannedModule
from ..plan.families import EXPERTS
from ..plan.fold import fold

#: What some model families' names are called in transformers 5 -> in their checkpoints.
RENAMED = ((".mlp.", ".block_sparse_moe."),)
_SHOWN = 5
_RULE = "the model is built from the config.json of one of the map's sources"


@dataclass(slots=True)
class Layout:
    """Names are those of the torch module.

    `linears`: become MixedPrecisionLinear. `experts`: become MixedPrecisionExperts, gate, up and down of each.
    `tensors`: parameters and buffers, each with its planned module and local name. `tied`: parameters that share
    another's weight, as the model does.
    """

    linears: dict[str, PlannedModule] = field(default_factory=dict)
    experts: dict[str, list[Sequence[PlannedModule]]] = field(default_factory=dict)
    tensors: dict[str, tuple[PlannedModule, str]] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)


def lay_out(model: torch.nn.Module, plan: Plan) -> Layout:
    """Match a model's parts with a plan's modules by name.

    Raises CoverageError where one has what the other lacks, ShapeError where sizes differ, UnsupportedError where a
    quantized weight belongs to neither a linear layer nor a layer's experts.
    """
    layout, planned = Layout(), plan.modules
    missing: list[str] = []
    for name, module in model.named_modules():
        stored = planned_name(name, planned)
        is_stack = any(parameter.dim() == 3 for parameter in module.parameters(recurse=False))
        if is_stack and (experts := _experts(name, planned)):
            _check_experts(name, module, experts)
            layout.experts[name] = experts
        elif type(module) is torch.nn.Linear and stored in planned:
            _check_linear(name, module, planned[stored])
            layout.linears[name] = planned[stored]
        else:
            missing += _own_tensors(layout, name, module, planned.get(stored))
    _tie(layout, model, missing)
    if missing:
        raise CoverageError(
            f"no weights for {_shown(missing)}",
            rule="a model's parameters have the names that its checkpoints give them",
            remedy="build the model from the config.json of one of the map's sources",
        )
    _check_all_used(layout, plan)
    return layout


def planned_name(name: str, planned: Mapping[str, object]) -> str:
    """A module's name in the plan: its own, or what its family calls it in checkpoints."""
    for ours, theirs in RENAMED:
        renamed = f"{name}.".replace(ours, theirs)[:-1]
        if renamed != name and (renamed in planned or f"{renamed}.0.w1" in planned):
            return renamed
    return name


def _experts(name: str, planned: Mapping[str, PlannedModule]) -> list[Sequence[PlannedModule]]:
    """Gate, up and down of every expert below `name`."""
    stored = planned_name(name, planned)
    spelling = next((names for names in EXPERTS if f"{stored}.0.{names[0]}" in planned), None)
    found: list[Sequence[PlannedModule]] = []
    while spelling and f"{stored}.{len(found)}.{spelling[0]}" in planned:
        found.append([planned[f"{stored}.{len(found)}.{part}"] for part in spelling])
    return found


def _check_experts(name: str, module: torch.nn.Module, experts: list[Sequence[PlannedModule]]) -> None:
    shapes = [tuple(one.shape) for one in module.parameters(recurse=False) if one.dim() == 3]
    if not hasattr(module, "is_transposed"):
        raise UnsupportedError(
            f"{type(module).__name__} computes its experts in a way that is not known here",
            tensor=name,
            rule="experts are linear layers each, or one module with transformers 5's `experts_implementation`",
            remedy="serve this model with SGLang",
        )
    has_bias = bool(getattr(module, "has_bias", False))
    if {has_bias} != {_has_bias(one) for expert in experts for one in expert}:
        raise ShapeError(
            f"the model's experts are with{'' if has_bias else 'out'} biases, the checkpoints' are not",
            tensor=name,
            rule=_RULE,
        )
    gate, _, down = (one.format.shape for one in experts[0])
    if any(shape[0] != len(experts) for shape in shapes) or not any(sorted(s[1:]) == sorted(down) for s in shapes):
        raise ShapeError(
            f"the model's experts are {' and '.join(str(list(shape)) for shape in shapes)}; the checkpoints hold "
            f"{len(experts)} of {list(gate)} and {list(down)}",
            tensor=name,
            rule=_RULE,
        )


def _check_linear(name: str, module: torch.nn.Linear, planned: PlannedModule) -> None:
    shape = module.out_features, module.in_features
    if planned.format.shape != shape or ((module.bias is not None) != _has_bias(planned)):
        raise ShapeError(
            f"the model's layer is {_with_bias(shape, module.bias is not None)}, "
            f"the checkpoint's {_with_bias(planned.format.shape, _has_bias(planned))}",
            tensor=name,
            rule=_RULE,
        )


def _with_bias(shape: Sequence[int], has_bias: bool) -> str:
    return f"{list(shape)} with{'' if has_bias else 'out'} a bias"


def _has_bias(planned: PlannedModule) -> bool:
    return "bias" in planned.tensors


def _own_tensors(layout: Layout, name: str, module: torch.nn.Module, planned: PlannedModule | None) -> Iterator[str]:
    """Place a module's own parameters and buffers; yields the names of those that the plan does not hold."""
    parameters = dict(module.named_parameters(recurse=False, remove_duplicate=False))
    computed = module._non_persistent_buffers_set
    buffers = {local: one for local, one in module.named_buffers(recurse=False) if local not in computed}
    for local, tensor in (parameters | buffers).items():
        full = f"{name}.{local}" if name else local
        if planned is None or local not in planned.tensors:
            # A buffer that is there already may be the model's own affair.
            if local in parameters or tensor.is_meta:
                yield full
            continue
        if planned.format.name != "plain":
            raise UnsupportedError(
                f"{type(module).__name__} cannot take a quantized weight",
                tensor=full,
                rule="linear layers (torch.nn.Linear itself) and layers of experts stay compressed",
                remedy="map this module to a source that holds it in 16 bits",
            )
        shape = tensor_specs(planned.format)[local].shape
        if shape != tuple(tensor.shape):
            what = f"the model's is {list(tensor.shape)}, the checkpoint's {list(shape)}"
            raise ShapeError(what, tensor=full, rule=_RULE)
        layout.tensors[full] = planned, local


def _tie(layout: Layout, model: torch.nn.Module, missing: list[str]) -> None:
    """Parameters that are one object with a parameter that has a weight need none of their own."""
    groups: dict[int, str] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        if name in layout.tensors:
            groups.setdefault(id(parameter), name)
    for name in list(missing):
        if name in parameters and id(parameters[name]) in groups:
            layout.tied[name] = groups[id(parameters[name])]
            missing.remove(name)


def _check_all_used(layout: Layout, plan: Plan) -> None:
    used = {module.name for module in layout.linears.values()}
    used |= {module.name for experts in layout.experts.values() for expert in experts for module in expert}
    placed = {(module.name, local) for module, local in layout.tensors.values()}
    unused = [
        f"{name}.{local}"
        for name, module in plan.modules.items()
        if name not in used
        for local in module.tensors
        if (name, local) not in placed
    ]
    if unused:
        raise CoverageError(
            f"the model has no place for {_shown(unused)}",
            rule="a model's parameters have the names that its checkpoints give them",
            remedy="build the model from the config.json of one of the map's sources",
        )


def _shown(names: Iterable[str]) -> str:
    patterns = fold(dict.fromkeys(names))
    more = f", and {len(patterns) - _SHOWN} more" if len(patterns) > _SHOWN else ""
    return ", ".join(patterns[:_SHOWN]) + more
