"""Several weights of one format as one: stacked along their outputs, and taken apart again.

Engines run q/k/v or gate/up as one matrix. Each stored tensor is stacked along its "out" axis, which is exact
as long as every part but the last ends on a unit of that axis (a block, a packed word).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch

from ..errors import InconsistentFormatError
from . import tensor_specs
from .base import COPY_AGAIN, ModuleFormat, Shape, TensorSpec

#: The tensor that repeats its weight's shape.
SHAPE = "weight_shape"


def fuse(parts: Sequence[ModuleFormat]) -> ModuleFormat | None:
    """The format of the parts stacked along `out`, or None where they cannot be one weight of that format."""
    first, rows = parts[0], sum(part.shape[0] for part in parts)
    if len(parts) == 1:
        return first
    if any(len(part.shape) != 2 or part.shape[1] != first.shape[1] for part in parts):
        return None
    if len({(part.name, _shapeless(part.parameters)) for part in parts}) > 1:
        return None
    if not all(_stackable(part, last=number == len(parts)) for number, part in enumerate(parts, 1)):
        return None
    return ModuleFormat(first.name, _stacked_parameters(parts), (rows, first.shape[1]))


def stack_common(
    tensors: Sequence[Mapping[str, torch.Tensor]], parts: Sequence[ModuleFormat]
) -> dict[str, torch.Tensor]:
    """The stacked weight's tensors that do not follow `out`, from each part's: equal in all, but for weight_shape."""
    common = {local: one for local, one in tensors[0].items() if out_axis(tensor_specs(parts[0])[local]) is None}
    if len(parts) > 1 and SHAPE in common:
        for part, own in zip(parts, tensors, strict=True):
            _check_shape(own[SHAPE], part)
        common[SHAPE] = torch.tensor(
            (sum(part.shape[0] for part in parts), parts[0].shape[1]), dtype=common[SHAPE].dtype
        )
    return common


def unstack(tensors: Mapping[str, torch.Tensor], parts: Sequence[ModuleFormat]) -> list[dict[str, torch.Tensor]]:
    """Each part's tensors of a stacked weight, as views. One that does not follow `out` is the same in every part."""
    if len(parts) == 1:
        return [dict(tensors)]
    result, begin = [], 0
    for part in parts:
        specs, views = tensor_specs(part), {}
        for local, tensor in tensors.items():
            axis = out_axis(specs[local])
            if axis is None:
                views[local] = torch.tensor(part.shape, dtype=tensor.dtype) if local == SHAPE else tensor
                continue
            unit = specs[local].axes[axis]
            views[local] = tensor.narrow(axis, unit.length(begin), unit.length(part.shape[0]))
        result.append(views)
        begin += part.shape[0]
    return result


def out_axis(spec: TensorSpec) -> int | None:
    """The dimension along which parts are stacked; None for a tensor that does not follow the outputs."""
    return next((dim for dim, axis in enumerate(spec.axes) if axis.role == "out"), None)


def _check_shape(stored: torch.Tensor, part: ModuleFormat) -> None:
    if tuple(stored.tolist()) != part.shape:
        raise InconsistentFormatError(
            f"weight_shape says {stored.tolist()}",
            tensor=SHAPE,
            rule=f"it repeats the weight's shape, {list(part.shape)}",
            remedy=COPY_AGAIN,
        )


def _shapeless(parameters: Any) -> tuple[object, ...]:
    return tuple(getattr(parameters, f.name) for f in fields(parameters) if not f.name.endswith("_shape"))


def _stackable(part: ModuleFormat, last: bool) -> bool:
    for local, spec in tensor_specs(part).items():
        axis = out_axis(spec)
        if axis is None:
            # GPTQ's g_idx without act-order is fixed by the parameters, hence the same in every part.
            if local != SHAPE and (local != "g_idx" or part.parameters.act_order):
                return False
        elif not last and part.shape[0] % spec.axes[axis].values:
            return False
    return True


def _stacked_parameters(parts: Sequence[ModuleFormat]) -> Any:
    parameters = parts[0].parameters
    if not hasattr(parameters, "scale_shape"):
        return parameters
    name = parameters.scale_name
    axis = out_axis(tensor_specs(parts[0])[name])
    assert axis is not None
    shapes: list[Shape] = [part.parameters.scale_shape for part in parts]
    rows = sum(shape[axis] for shape in shapes)
    return replace(parameters, scale_shape=(*shapes[0][:axis], rows, *shapes[0][axis + 1 :]))
