"""SGLang's fused MoE kernels, Triton and Marlin, fed from file tensors of any format that one of them can run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from sglang.srt.layers.moe.moe_runner.base import MoeQuantInfo
from sglang.srt.layers.moe.moe_runner.marlin import MarlinMoeQuantInfo
from sglang.srt.layers.moe.moe_runner.triton import TritonMoeQuantInfo
from sglang.srt.layers.moe.utils import MoeRunnerBackend

from ...formats import ModuleFormat
from ...formats.scaled import scale_values
from ...formats.slicing import Range
from ..loading import kernel_builds
from . import marlin

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class ExpertFormats:
    """How the experts of a group are stored: gate and up alike, down in a format of the same kernel."""

    gate_up: ModuleFormat
    down: ModuleFormat


class ExpertKernel(Protocol):
    """One of SGLang's MoE runners."""

    backend: MoeRunnerBackend
    #: Multiple of the intermediate width that the kernel computes with.
    width: int

    def why_not(self, formats: ExpertFormats) -> str | None:
        """Why it cannot run experts of these formats; None where it can."""
        ...

    def compiled(self, formats: ExpertFormats, dtype: torch.dtype, has_others: bool) -> set[kernel_builds.Kernel]:
        """What SGLang compiles at the first call, for minutes."""
        ...

    def prepare(self, w13: Tensors, w2: Tensors, formats: ExpertFormats, kept: Range, dtype: torch.dtype) -> Tensors:
        """File tensors -> the kernel's. Of down's columns all but those in `kept` are made to weigh nothing."""
        ...

    def quant_info(self, tensors: Mapping[str, torch.Tensor], formats: ExpertFormats, has_others: bool) -> MoeQuantInfo:
        """What SGLang's runner wants. With `has_others` ids of -1 occur: experts of other groups and ranks."""
        ...


class TritonExperts:
    """16-bit, FP8 and INT8 weights; the latter two meet activations quantized per token (or per block)."""

    backend, width = MoeRunnerBackend.TRITON, 1

    def why_not(self, formats: ExpertFormats) -> str | None:
        """Both matrices in one format and granularity."""
        one, other = formats.gate_up, formats.down
        if one.name not in ("plain", "fp8", "int8"):
            return f"it runs plain, fp8 and int8, not {one.name}"
        if one.name != other.name or _scheme(one) != _scheme(other):
            return "it runs gate, up and down of an expert in one format"
        block = _block(one)
        if block and any(size < 32 or size & (size - 1) for size in block):
            return f"it takes blocks of powers of two from 32 on, not {block[0]}x{block[1]}"
        if block and one.shape[1] % block[1]:
            return f"it quantizes activations in whole blocks of {block[1]} columns, not {one.shape[1]}"
        return None

    def compiled(self, formats: ExpertFormats, dtype: torch.dtype, has_others: bool) -> set[kernel_builds.Kernel]:
        """None: Triton's compiler takes seconds."""
        return set()

    def prepare(self, w13: Tensors, w2: Tensors, formats: ExpertFormats, kept: Range, dtype: torch.dtype) -> Tensors:
        """Scales in float32: [experts, rows, 1], or [experts, blocks, blocks]."""
        tensors = {}
        begin, end = kept
        for outside in (slice(0, begin), slice(end, None)):
            w2["weight"][:, :, outside].view(torch.uint8).zero_()
        for name, files, module_format in (("w13", w13, formats.gate_up), ("w2", w2, formats.down)):
            tensors[f"{name}_weight"] = files["weight"]
            if module_format.name != "plain":
                parts = 2 if name == "w13" else 1
                rows = [files["weight"].shape[1] // parts] * parts
                tensors[f"{name}_scale"] = row_scales(files, module_format, rows)
            if "input_scale" in files:  # planned and proven, but per-token scales replace it
                tensors[f"{name}_input_scale"] = files["input_scale"]
        return tensors

    def quant_info(self, tensors: Mapping[str, torch.Tensor], formats: ExpertFormats, has_others: bool) -> MoeQuantInfo:
        """The kernel skips ids of -1 by itself where the runner's config tells of other experts."""
        one = formats.gate_up
        flags: dict[str, Any] = {}
        if one.name == "fp8":
            block = _block(one)
            flags = {"use_fp8_w8a8": True, "per_channel_quant": not block, "block_shape": list(block or ()) or None}
        elif one.name == "int8":
            quantized = one.parameters.activations is not None
            flags = {"use_int8_w8a8": quantized, "use_int8_w8a16": not quantized, "per_channel_quant": quantized}
        return TritonMoeQuantInfo(
            w13_weight=tensors["w13_weight"],
            w2_weight=tensors["w2_weight"],
            w13_scale=tensors.get("w13_scale"),
            w2_scale=tensors.get("w2_scale"),
            **flags,
        )


class MarlinExperts:
    """Packed integers of 4 or 8 bits, which meet 16-bit activations."""

    backend, width = MoeRunnerBackend.MARLIN, 64

    def why_not(self, formats: ExpertFormats) -> str | None:
        """Formats that Marlin takes, of one width, with inputs and outputs in whole tiles."""
        both = (formats.gate_up, formats.down)
        if others := [one.name for one in both if one.name not in ("gptq", "awq", "packed")]:
            return f"it runs gptq, awq and packed, not {others[0]}"
        if len({one.parameters.bits for one in both}) > 1:
            return "it runs gate, up and down of an expert in as many bits"
        if len({getattr(one.parameters, "act_order", False) for one in both}) > 1:
            return "it runs gate, up and down of an expert with act-order, or all without"
        if any(marlin.has_zero_points(one) and one.parameters.group_size == 32 for one in both):
            # On an H100 with SGLang 0.5.17 the products were wrong, AWQ's own as well; groups of 64 and more are right.
            return "its experts are wrong with zero points in groups of 32"
        if formats.down.shape[0] % 128:
            return f"it takes hidden sizes that are multiples of 128, not {formats.down.shape[0]}"
        return next(filter(None, map(marlin.why_not, both)), None)

    def compiled(self, formats: ExpertFormats, dtype: torch.dtype, has_others: bool) -> set[kernel_builds.Kernel]:
        """The repacking of both matrices, and the product."""
        layouts = {kernel_builds.repacking(marlin.has_zero_points(one)) for one in (formats.gate_up, formats.down)}
        return {*layouts, kernel_builds.experts(dtype, has_others)}

    def prepare(self, w13: Tensors, w2: Tensors, formats: ExpertFormats, kept: Range, dtype: torch.dtype) -> Tensors:
        """SGLang's own repacking, with scales in the activations' dtype, which the kernel wants."""
        tensors: Tensors = {}
        for name, files, module_format in (("w13", w13, formats.gate_up), ("w2", w2, formats.down)):
            p = module_format.parameters
            source = marlin.to_marlin_source(files, module_format, dtype)
            files.clear()  # the largest tensors would be alive three times
            if name == "w2":
                marlin.zero_outside(source, kept, p.bits, p.group_size)
            tensors |= {f"{name}_{key}": tensor for key, tensor in _repack(source, p.bits).items()}
        return tensors

    def quant_info(self, tensors: Mapping[str, torch.Tensor], formats: ExpertFormats, has_others: bool) -> MoeQuantInfo:
        """Without an expert map the kernel would run expert -1; with one it takes a path that leaves it out."""
        number = tensors["w13_qweight"].shape[0]
        empty = tensors["w13_qweight"].new_empty((number, 0))
        order = {
            f"{name}_{key}": tensors.get(f"{name}_{key}", empty)
            for name in ("w13", "w2")
            for key in ("g_idx", "g_idx_sort_indices")
        }
        p = formats.down.parameters
        cut = tensors["w2_qweight"].shape[1] * 16 < formats.down.shape[1]
        return MarlinMoeQuantInfo(
            w13_qweight=tensors["w13_qweight"],
            w2_qweight=tensors["w2_qweight"],
            w13_scales=tensors["w13_scales"],
            w2_scales=tensors["w2_scales"],
            w13_qzeros=tensors.get("w13_qzeros"),
            w2_qzeros=tensors.get("w2_qzeros"),
            weight_bits=p.bits,
            is_k_full=not (cut and getattr(p, "act_order", False)),
            expert_map=torch.arange(number, dtype=torch.int32, device=empty.device) if has_others else None,
            global_num_experts=number,
            **order,
        )


KERNELS: tuple[ExpertKernel, ...] = (TritonExperts(), MarlinExperts())


def unit(formats: ExpertFormats) -> int:
    """Intermediate columns that are stored only together, in gate and up's rows or in down's columns."""
    units = [1]
    for module_format in (formats.gate_up, formats.down):
        p = module_format.parameters
        units += _block(module_format) or ()
        if hasattr(p, "bits"):
            units.append(32 // math.gcd(32, p.bits))
    p = formats.down.parameters
    group = getattr(p, "group_size", None)
    if group and group < formats.down.shape[1] and not getattr(p, "act_order", False):
        units.append(group)
    return math.lcm(*units)


def row_scales(files: Mapping[str, torch.Tensor], module_format: ModuleFormat, rows: Sequence[int]) -> torch.Tensor:
    """float32 scales that multiply: [n, all rows, 1], or by blocks. A tensor's one scale counts for its part's rows."""
    p = module_format.parameters
    scale = scale_values(files[p.scale_name])
    if getattr(p, "inverse", False):
        scale = torch.where(scale == 0, 0, 1 / scale)  # rows that fill up a unit have none
    if p.granularity == "block":
        return scale.contiguous()
    if p.granularity == "tensor":
        counts = torch.tensor(rows, device=scale.device)
        scale = scale.reshape(len(scale), len(rows)).repeat_interleave(counts, 1)
    return scale.reshape(len(scale), sum(rows), 1).contiguous()


def _repack(source: Tensors, bits: int) -> Tensors:
    # Imported here: SGLang has these only where there is a GPU.
    from sglang.srt.hardware_backend.gpu.quantization.awq_kernels import awq_marlin_moe_repack
    from sglang.srt.hardware_backend.gpu.quantization.gptq_kernels import gptq_marlin_moe_repack
    from sglang.srt.layers.quantization.marlin_utils import marlin_moe_permute_scales, moe_awq_to_marlin_zero_points

    qweight, scales = source["qweight"], source["scales"]
    number, groups, rows = scales.shape
    found: Tensors = {}
    order = qweight.new_empty((number, 0))
    if "g_idx" in source:
        order = torch.argsort(source["g_idx"], dim=1, stable=True).to(torch.int32)
        found = {"g_idx": source["g_idx"].gather(1, order.long()), "g_idx_sort_indices": order}
    if "qzeros" in source:
        found["qweight"] = awq_marlin_moe_repack(qweight, order, qweight.shape[1], rows, bits)
        found["qzeros"] = moe_awq_to_marlin_zero_points(source["qzeros"], groups, rows, bits)
    else:
        found["qweight"] = gptq_marlin_moe_repack(qweight, order, qweight.shape[1] * 32 // bits, rows, bits)
    # The order depends on whether there are several groups; SGLang's own call asks the wrong size for w13.
    found["scales"] = marlin_moe_permute_scales(scales, 2, rows, 1 if groups > 1 else -1)
    return found


def _block(module_format: ModuleFormat) -> tuple[int, int] | None:
    return getattr(module_format.parameters, "block", None)


def _scheme(module_format: ModuleFormat) -> tuple[object, ...]:
    p = module_format.parameters
    return tuple(getattr(p, key, None) for key in ("block", "activations"))
