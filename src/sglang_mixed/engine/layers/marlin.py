"""Packed integers of any source in the two layouts that SGLang repacks for Marlin: GPTQ's, and AWQ's with zero points.

All tensors have a leading dimension: experts, or 1 for a linear layer. Everything here is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...errors import InconsistentFormatError
from ...formats import ModuleFormat
from ...formats.awq import ORDER
from ...formats.gptq import unpack
from ...formats.slicing import Range

Tensors = dict[str, torch.Tensor]

#: Columns that share a scale; one scale for all of them works as well.
GROUP_SIZES = (32, 64, 128)
NIBBLES = 8  # 4-bit values in a word


def why_not(module_format: ModuleFormat) -> str | None:
    """Why Marlin cannot run packed integers of this format; None where it can."""
    p = module_format.parameters
    if module_format.name == "packed" and p.strategy == "tensor":
        return "Marlin has scales per group or row"
    symmetric = module_format.name != "awq" and p.symmetric
    if p.bits not in (4, 8) or (p.bits == 8 and not symmetric):
        return f"Marlin takes 4 bits, or 8 if symmetric, not {p.bits}{'' if symmetric else ' with zero points'}"
    if not symmetric and getattr(p, "act_order", False):
        return "Marlin takes act-order of symmetric weights only"
    if p.group_size not in GROUP_SIZES and p.group_size < module_format.shape[1]:
        return f"Marlin takes groups of {', '.join(map(str, GROUP_SIZES))} or whole rows, not {p.group_size}"
    return None


def has_zero_points(module_format: ModuleFormat) -> bool:
    """Whether the format's layout for Marlin is AWQ's."""
    return module_format.name == "awq" or not module_format.parameters.symmetric


def to_marlin_source(files: Mapping[str, torch.Tensor], module_format: ModuleFormat, dtype: torch.dtype) -> Tensors:
    """`qweight` and `scales` [n, groups, out] in `dtype`; `g_idx` [n, in] of act-order.

    Symmetric: qweight [n, in*bits/32, out], GPTQ's. Else [n, in, out/8] with `qzeros` [n, groups, out/8], AWQ's.
    """
    p = module_format.parameters
    if module_format.name == "awq":
        return {"qweight": files["qweight"], "qzeros": files["qzeros"], "scales": files["scales"].to(dtype)}
    if module_format.name == "packed":
        # The same bit stream, but its weight lies row by row.
        qweight = files["weight_packed"].transpose(1, 2).contiguous()
        scales = files["weight_scale"].transpose(1, 2).contiguous()
        zeros, g_idx = files.get("weight_zero_point"), files.get("weight_g_idx")
        offset = 0
    else:
        qweight, scales, zeros, g_idx, offset = files["qweight"], files["scales"], None, files.get("g_idx"), 0
        if not p.symmetric:
            zeros, offset = files["qzeros"].transpose(1, 2), p.zero_offset
    found = {"qweight": qweight, "scales": scales.to(dtype)}
    if p.act_order:
        assert g_idx is not None
        found["g_idx"] = _common_groups(g_idx)
    elif not p.symmetric:
        assert zeros is not None
        found["qweight"] = _in_columns(qweight, p.bits)
        found["qzeros"] = pack_columns(_zero_points(zeros, offset, scales.shape[2]))
    return found


def zero_outside(source: Tensors, kept: Range, bits: int, group_size: int) -> None:
    """Make all inputs outside of `kept` weigh exactly nothing, in place: their codes become their zero points."""
    qweight, (begin, end) = source["qweight"], kept
    if "qzeros" in source:
        groups = torch.arange(qweight.shape[1], device=qweight.device) // group_size
        zeros = source["qzeros"][:, groups.clamp_max(source["qzeros"].shape[1] - 1)]
        for outside in (slice(0, begin), slice(end, None)):
            qweight[:, outside] = zeros[:, outside]
        return
    values = 32 // bits
    columns = torch.arange(qweight.shape[1] * values, device=qweight.device).view(-1, values)
    is_kept = ((columns >= begin) & (columns < end)).to(torch.int64)
    shifts = torch.arange(values, device=qweight.device) * bits
    keep = (is_kept * (((1 << bits) - 1) << shifts)).sum(1).to(torch.int32)
    middle = ((1 - is_kept) * ((1 << (bits - 1)) << shifts)).sum(1).to(torch.int32)
    qweight.bitwise_and_(keep[:, None]).bitwise_or_(middle[:, None])


def pack_columns(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [n, rows, out] of 0..15 -> int32 [n, rows, out/8] in AWQ's order."""
    words = codes.view(*codes.shape[:2], -1, NIBBLES)
    packed = torch.zeros(words.shape[:3], dtype=torch.int32, device=codes.device)
    for nibble, column in enumerate(ORDER):
        packed |= words[..., column].to(torch.int32) << (4 * nibble)
    return packed


def _in_columns(qweight: torch.Tensor, bits: int) -> torch.Tensor:
    """GPTQ's layout [n, in*bits/32, out] -> AWQ's [n, in, out/8]. A matrix at a time: codes are twice as large."""
    number, words, out = qweight.shape
    packed = qweight.new_empty((number, words * 32 // bits, out // NIBBLES))
    for place, one in zip(packed, qweight, strict=True):
        place.copy_(pack_columns(unpack(one, bits).unsqueeze(0))[0])
    return packed


def _zero_points(packed: torch.Tensor, offset: int, out: int) -> torch.Tensor:
    """Words along `out` [n, out/8, groups] -> uint8 [n, groups, out]."""
    zeros = torch.stack([unpack(one.contiguous(), 4)[:out].T for one in packed]) + offset
    if zeros.numel() and int(zeros.max()) > 15:
        raise InconsistentFormatError(
            "a zero point of 16",
            tensor="qzeros",
            rule="Marlin keeps zero points in 4 bits",
            remedy="map this module to another source, or serve it on the CPU",
        )
    return zeros.contiguous()


def _common_groups(g_idx: torch.Tensor) -> torch.Tensor:
    """[n, parts, in] -> [n, in]: stacked parts read their inputs in one order."""
    first = g_idx[:, 0]
    if not all(torch.equal(first, g_idx[:, part]) for part in range(1, g_idx.shape[1])):
        raise InconsistentFormatError(
            "the parts of one matrix have different g_idx",
            tensor="g_idx",
            rule="SGLang's kernel reads the inputs of gate and up in one order",
            remedy="map these modules to a source without act-order",
        )
    return first.contiguous()


def source_config(module_format: ModuleFormat) -> dict[str, Any]:
    """What a config.json says of the layout that `to_marlin_source` makes, as SGLang's configs read it."""
    p, columns = module_format.parameters, module_format.shape[1]
    group_size = p.group_size if p.group_size < columns else -1
    if has_zero_points(module_format):
        return {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm"}
    return {
        "quant_method": "gptq",
        "bits": p.bits,
        "group_size": group_size,
        "desc_act": p.act_order,
        "sym": True,
        "checkpoint_format": "gptq",
    }
