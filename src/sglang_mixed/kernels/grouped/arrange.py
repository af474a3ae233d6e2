"""Weights from their files' layouts to that of the Triton kernels, on whatever device they are.

Whole bytes stay row by row. What is narrower, or sliced, lies in int32 words, of each plane first the step, then the
row, then the step's words: what one program loads at once is one piece of memory. Within a step values are
little-endian along the columns; or each field of the words is a slice of neighbouring columns, one in each word
(`Codec.is_sliced`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from ...formats import ModuleFormat
from ...formats.awq import unpack_columns
from ...formats.bit_stream import unpack
from ...formats.gptq import group_index
from ...formats.nvfp4 import LAYOUTS as NVFP4_LAYOUTS
from .codec import LARGEST_STEP, Codec, codec_of, least_step

Tensors = dict[str, torch.Tensor]
#: Values of narrow weights that are unpacked together, into a byte each.
VALUES_AT_ONCE = 1 << 25


class Arranged(NamedTuple):
    """Weights of one codec, each tensor with a leading dimension of weights."""

    codec: Codec
    tensors: Tensors


def arrange(files: Tensors, module_format: ModuleFormat, codec: Codec | None = None) -> Arranged:
    """Local name -> tensor [weights, ...] of weights in one format -> the kernel's tensors; `files` is emptied.

    `weight`, and as the codec has them `scale`, `zero`, `factor`, `order` (the column of x that a stored one meets, -1
    for filling) and `groups` (of each step). Weights that lie in words are arranged some at a time; others not copied.
    Raises InconsistentFormatError for a g_idx that names groups which are not there.
    """
    codec = codec or codec_of(module_format)
    tensors: Tensors = {}
    if codec.scale:
        tensors["scale"] = _scales(files, module_format, codec)
    if codec.zero_bits:
        tensors["zero"] = _zeros(files, module_format, codec)
    if codec.factor:
        factor = files.pop(NVFP4_LAYOUTS[module_format.parameters.layout][1])
        tensors["factor"] = factor.reshape(-1).to(torch.float32)
    if codec.is_ordered:
        codec, order, groups = _ordered(files, module_format, codec)
        tensors |= {"order": order, "groups": groups}
    return Arranged(codec, {"weight": _weights(files, module_format, codec, tensors.get("order")), **tensors})


def _weights(files: Tensors, module_format: ModuleFormat, codec: Codec, order: torch.Tensor | None) -> torch.Tensor:
    name = next(name for name in ("qweight", "weight_packed", "weight") if name in files)
    stored = files.pop(name)
    in_words = codec.has_words or codec.is_sliced
    if not in_words and module_format.name not in ("gptq", "packed"):
        return stored.contiguous()
    unit = codec.rows * codec.width
    size = unit * codec.bits // 32 if in_words else codec.rows * codec.stored_columns
    dtype = torch.int32 if in_words else torch.uint8
    found = torch.empty(len(stored), size, dtype=dtype, device=stored.device)
    at_once = max(1, VALUES_AT_ONCE // unit)
    for begin in range(0, len(stored), at_once):
        some = slice(begin, begin + at_once)
        values = _values(stored[some], module_format)
        if order is not None:
            values = values.take_along_dim(order[some, None].clamp_min(0).long(), 2)
        found[some] = words(values, codec) if in_words else values.flatten(1)
    return found


def words(values: torch.Tensor, codec: Codec) -> torch.Tensor:
    """uint8 [weights, rows, columns] -> int32 [weights, rows * width * bits / 32], plane by plane."""
    values = torch.nn.functional.pad(values, (0, codec.width - values.shape[-1]))
    parts = []
    for bits, below in codec.planes:
        fields, number = 32 // bits, codec.step * bits // 32
        shape = (fields, number) if codec.is_sliced else (number, fields)
        steps = ((values >> below) & ((1 << bits) - 1)).view(len(values), codec.rows, -1, *shape)
        steps = steps.mT if codec.is_sliced else steps
        plane = torch.zeros(steps.shape[:-1], dtype=torch.int32, device=values.device)
        for place in range(fields):
            plane |= steps[..., place].to(torch.int32) << (bits * place)
        parts.append(plane.transpose(1, 2).flatten(1))
    return torch.cat(parts, 1)


def _values(stored: torch.Tensor, module_format: ModuleFormat) -> torch.Tensor:
    """uint8 [weights, rows, columns]."""
    name, columns = module_format.name, module_format.shape[1]
    if name == "gptq":
        return unpack(stored, module_format.parameters.bits, 1).mT.contiguous()
    if name == "awq":
        return unpack_columns(stored).mT.contiguous()
    if name == "packed":
        return unpack(stored, module_format.parameters.bits, 2)[..., :columns].contiguous()
    if name == "fp8":
        return stored.view(torch.uint8)
    octets = stored.view(torch.uint8)
    return torch.stack((octets & 15, octets >> 4), dim=-1).flatten(-2)[..., :columns].contiguous()


def _scales(files: Tensors, module_format: ModuleFormat, codec: Codec) -> torch.Tensor:
    """[weights, column groups, row groups], in the bytes of the file."""
    name = getattr(module_format.parameters, "scale_name", None)
    scale = files.pop(name or ("scales" if "scales" in files else "weight_scale"))
    if module_format.name in ("gptq", "awq"):
        return scale.contiguous()
    return scale.reshape(len(scale), codec.row_groups, -1).transpose(1, 2).contiguous()


def _zeros(files: Tensors, module_format: ModuleFormat, codec: Codec) -> torch.Tensor:
    """uint8 [weights, column groups, row groups], or two of these to a byte, the first in its low half."""
    name, bits = module_format.name, codec.bits
    if name == "packed":
        stored = files.pop("weight_zero_point")
        if module_format.parameters.strategy == "tensor":
            return (stored.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8).reshape(-1, 1, 1)
        codes = unpack(stored, bits, 1)[:, : codec.rows].transpose(1, 2)
    elif name == "awq":
        codes = unpack_columns(files.pop("qzeros"))
    else:
        codes = unpack(files.pop("qzeros"), bits, 2)[..., : codec.rows]
    if codec.zero_bits == 8:
        return codes.contiguous()
    codes = torch.nn.functional.pad(codes.contiguous(), (0, codec.rows % 2))
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def _ordered(files: Tensors, module_format: ModuleFormat, codec: Codec) -> tuple[Codec, torch.Tensor, torch.Tensor]:
    """The codec, `order` int32 [weights, width] and `groups` int32 [weights, steps]."""
    p = module_format.parameters
    g_idx = files.pop("g_idx" if "g_idx" in files else "weight_g_idx").flatten(1)
    num_groups = p.num_groups or -(-codec.columns // p.group_size)
    columns = [group_index(one, p, codec.columns, num_groups) for one in g_idx]
    counts = torch.stack([one.bincount(minlength=num_groups) for one in columns])
    # Powers of two: the least divides all.
    common = int(torch.gcd(counts, torch.tensor(LARGEST_STEP, device=counts.device)).min())
    step = max(common, least_step(codec))
    filled = -(-counts // step) * step
    width = int(filled.sum(1).max())
    order = torch.full((len(columns), width), -1, dtype=torch.int32, device=g_idx.device)
    groups = torch.zeros(len(columns), width // step, dtype=torch.int32, device=g_idx.device)
    for number, (one, count, room) in enumerate(zip(columns, counts, filled, strict=True)):
        by_group = one.argsort(stable=True)
        places = (
            torch.arange(codec.columns, device=one.device)
            + (room.cumsum(0) - room - count.cumsum(0) + count)[one[by_group]]
        )
        order[number, places] = by_group.to(torch.int32)
        own = torch.arange(num_groups, device=one.device).repeat_interleave(room // step)
        groups[number, : len(own)] = own.to(torch.int32)
    return replace(codec, step=step, width=width), order, groups
