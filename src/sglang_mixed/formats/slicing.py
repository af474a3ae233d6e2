"""A part of a weight: some rows and columns of it, cut out of every stored tensor.

Blocks, groups and packed words cannot be cut. A region that ends inside one is first *widened* to whole units; who
computes with the wider weight pads x with zeros or drops the rows that were not asked for.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from . import tensor_specs
from .base import ITEM_BYTES, Axis, ModuleFormat, Shape

#: [begin, end) indices of one dimension.
Range = tuple[int, int]


class Region(NamedTuple):
    """Rows [begin, end) and columns [begin, end) of a weight [out, in]; a vector has rows only."""

    rows: Range
    columns: Range


def whole(shape: Shape) -> Region:
    """All of a weight."""
    rows, columns = (*shape, 1, 1)[:2]
    return Region((0, rows), (0, columns))


@functools.lru_cache(maxsize=65_536)
def widen(module_format: ModuleFormat, region: Region) -> Region:
    """The least region of whole blocks, groups and words that holds this one."""
    everything = whole(module_format.shape)
    ranges = []
    for role, (begin, end), (_, size) in zip(("out", "in"), region, everything, strict=True):
        units = [axis.values for axis in _axes(module_format, role) if axis.values < size]
        unit = math.lcm(*units)
        ranges.append((begin // unit * unit, min(-(-end // unit) * unit, size)))
    return Region(*ranges)


@functools.lru_cache(maxsize=65_536)
def cut(module_format: ModuleFormat, region: Region) -> ModuleFormat:
    """The format of a widened region, as a weight of its own."""
    shape = module_format.shape
    if region == whole(shape):
        return module_format
    rows, columns = (end - begin for begin, end in region)
    parameters = _cut_parameters(module_format, region)
    return replace(module_format, parameters=parameters, shape=(rows, columns, *shape[2:])[: len(shape)])


@functools.lru_cache(maxsize=65_536)
def tensor_ranges(module_format: ModuleFormat, region: Region) -> dict[str, tuple[Range, ...]]:
    """Local name -> which part of each of its dimensions a widened region takes."""
    sizes = whole(module_format.shape)
    found = {}
    for local, spec in tensor_specs(module_format).items():
        ranges = []
        for axis, length in zip(spec.axes, spec.shape, strict=True):
            place = {"out": 0, "in": 1}.get(axis.role or "")
            if place is None or axis.values >= sizes[place][1]:
                ranges.append((0, length))
            else:
                begin, end = region[place]
                ranges.append((axis.length(begin), axis.length(end)))
        found[local] = tuple(ranges)
    return found


@functools.cache
def part_bytes(module_format: ModuleFormat, region: Region) -> dict[str, int]:
    """Local name -> bytes of that part of it which a widened region takes."""
    specs = tensor_specs(module_format)
    return {
        local: math.prod(end - begin for begin, end in ranges) * ITEM_BYTES[specs[local].dtypes[0]]
        for local, ranges in tensor_ranges(module_format, region).items()
    }


def rebase(local: str, tensor: torch.Tensor, module_format: ModuleFormat, region: Region) -> torch.Tensor:
    """A cut tensor whose values speak of the whole weight, made to speak of the region: g_idx and weight_shape."""
    if region == whole(module_format.shape):
        return tensor
    parameters = module_format.parameters
    if local.endswith("g_idx") and not parameters.act_order and parameters.group_size < module_format.shape[1]:
        first: int = region.columns[0] // parameters.group_size
        return tensor - first
    if local == "weight_shape":
        spans = torch.tensor([end - begin for begin, end in region], dtype=tensor.dtype, device=tensor.device)
        return tensor - torch.tensor(module_format.shape, dtype=tensor.dtype, device=tensor.device) + spans
    return tensor


def _axes(module_format: ModuleFormat, role: str) -> Iterator[Axis]:
    return (axis for spec in tensor_specs(module_format).values() for axis in spec.axes if axis.role == role)


def _cut_parameters(module_format: ModuleFormat, region: Region) -> Any:
    parameters, changes = module_format.parameters, dict[str, Any]()
    columns = region.columns[1] - region.columns[0]
    lengths = {
        local: tuple(end - begin for begin, end in ranges)
        for local, ranges in tensor_ranges(module_format, region).items()
    }
    if hasattr(parameters, "scale_shape"):
        changes["scale_shape"] = lengths[parameters.scale_name]
    if hasattr(parameters, "others"):
        changes["others"] = tuple((name, dtype, lengths[name]) for name, dtype, _ in parameters.others)
    if getattr(parameters, "act_order", False) and columns < module_format.shape[1]:
        # A column's group may be any of the whole weight's.
        changes["num_groups"] = parameters.num_groups or math.ceil(module_format.shape[1] / parameters.group_size)
    elif isinstance(getattr(parameters, "group_size", None), int):
        changes["group_size"] = min(parameters.group_size, columns)
    return replace(parameters, **changes) if changes else parameters
