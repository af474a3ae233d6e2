"""SGLang's own linear methods on an accelerator, built from a format instead of a checkpoint's config."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization.base_config import LinearMethodBase, QuantizationConfig
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

from ...errors import UnsupportedError
from ...formats import ModuleFormat, label_of
from ...plan import PlannedModule
from .. import state
from ..loading import kernel_builds
from . import decoded, marlin
from .expert_kernels import row_scales

Tensors = dict[str, torch.Tensor]
#: File tensors [1, ...], the parts' format, their rows, the activations' dtype -> the method's parameters.
Convert = Callable[[Mapping[str, torch.Tensor], ModuleFormat, Sequence[int], torch.dtype], Tensors]

REMEDY = "map these modules to a source in another format, or serve on the CPU"
#: What Marlin's tiles divide.
MARLIN_ROWS, MARLIN_COLUMNS = 64, 128


@dataclass(frozen=True, slots=True)
class LinearRecipe:
    """A method, and how file tensors become its parameters."""

    method: Callable[[LinearBase], LinearMethodBase]
    convert: Convert
    arguments: Mapping[str, Any] = field(default_factory=dict)  # of `create_weights`


def needs_decoding(parts: Sequence[PlannedModule], rows: Sequence[int]) -> bool:
    """Whether our own kernel runs parts that could be one matrix; says so, and why.

    Raises UnsupportedError where it must and cannot.
    """
    planned = state.current_loading().plan.parts
    module_format, columns = parts[0].format, planned[parts[0].name].format.shape[1]
    label = label_of(module_format)
    reason = why_not(module_format) or _why_not_shape(module_format, sum(rows), columns)
    if not all(planned[part.name].is_exact for part in parts):
        reason = (
            reason or "SGLang's kernels run whole blocks, groups and words, and this rank's share ends inside of one"
        )
    if reason and (ours := decoded.why_not(module_format)):
        raise UnsupportedError(
            f"no kernel here runs {label}",
            tensor=", ".join(part.name for part in parts),
            rule=f"{reason}; {ours}",
            remedy=REMEDY,
        )
    if reason := reason or decoded.why_wished([planned[part.name].format for part in parts]):
        decoded.tell(label, reason)
    return bool(reason)


def why_not(module_format: ModuleFormat) -> str | None:
    """Why no linear method of SGLang runs weights of this format; None where one does."""
    p = module_format.parameters
    if module_format.name == "plain":
        return None
    if module_format.name == "int8":
        return (
            None if p.activations else "SGLang's INT8 kernel quantizes activations, which these weights do not ask for"
        )
    if module_format.name == "fp8":
        odd = p.block and any(size < 32 or size & (size - 1) for size in p.block)
        return f"FP8 blocks are of powers of two from 32 on, not {p.block[0]}x{p.block[1]}" if odd else None
    if module_format.name in ("gptq", "awq", "packed"):
        return marlin.why_not(module_format)
    return f"there is no method for {module_format.name} weights"


def _why_not_shape(module_format: ModuleFormat, rows: int, columns: int) -> str | None:
    block = getattr(module_format.parameters, "block", None)
    if block and columns % block[1]:
        return f"activations are quantized in whole blocks of {block[1]} columns, not {columns}"
    if module_format.name not in ("gptq", "awq", "packed"):
        return None
    if rows % MARLIN_ROWS == 0 and columns % MARLIN_COLUMNS == 0:
        return None
    return f"Marlin takes multiples of {MARLIN_ROWS} rows and {MARLIN_COLUMNS} columns, not {rows} x {columns}"


def recipe_for(module_format: ModuleFormat) -> LinearRecipe:
    """The recipe for a matrix that needs no decoding of ours."""
    p = module_format.parameters
    if module_format.name == "plain":
        return LinearRecipe(lambda _: UnquantizedLinearMethod(), _plain)
    if module_format.name in ("gptq", "awq", "packed"):
        name = "awq_marlin" if marlin.has_zero_points(module_format) else "gptq_marlin"
        described = marlin.source_config(module_format)
        return LinearRecipe(_from_config(name, described), _packed)
    if module_format.name == "fp8" and p.block:
        described = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(p.block)}
        method = _from_config("fp8", described)
        # Whole blocks are checked already, also where SGLang's check would ask for more.
        arguments = {"skip_block_quant_check": True}
        return LinearRecipe(method if p.block == (128, 128) else _by_triton(method), _blocks, arguments)
    name = "w8a8_fp8" if module_format.name == "fp8" else "w8a8_int8"
    return LinearRecipe(_from_config(name, {"quant_method": name}), _rows)


def compiled(module_format: ModuleFormat, dtype: torch.dtype) -> set[kernel_builds.Kernel]:
    """What SGLang compiles at the first call of this format's method."""
    if module_format.name not in ("gptq", "awq", "packed"):
        return set()
    return {kernel_builds.repacking(marlin.has_zero_points(module_format)), kernel_builds.linear(dtype)}


def _from_config(name: str, described: dict[str, Any]) -> Callable[[LinearBase], LinearMethodBase]:
    def method(layer: LinearBase) -> LinearMethodBase:
        found: LinearMethodBase = _config_class(name).from_config(described).get_quant_method(layer, "")
        return found

    return method


def _by_triton(method: Callable[[LinearBase], LinearMethodBase]) -> Callable[[LinearBase], LinearMethodBase]:
    """The same method on the one kernel that asks for the block's size: SGLang's others take 128 x 128 for granted."""

    def chosen(layer: LinearBase) -> LinearMethodBase:
        from sglang.srt.layers.quantization.fp8_utils import triton_w8a8_block_fp8_linear

        found: Any = method(layer)
        found.w8a8_block_fp8_linear = triton_w8a8_block_fp8_linear
        return found

    return chosen


def _config_class(name: str) -> type[QuantizationConfig]:
    # Not from SGLang's table: that leaves out what the machine at hand cannot run.
    if name == "gptq_marlin":
        from sglang.srt.layers.quantization.gptq import GPTQMarlinConfig as config
    elif name == "awq_marlin":
        from sglang.srt.layers.quantization.awq import AWQMarlinConfig as config
    elif name == "fp8":
        from sglang.srt.layers.quantization.fp8 import Fp8Config as config
    elif name == "w8a8_fp8":
        from sglang.srt.layers.quantization.w8a8_fp8 import W8A8Fp8Config as config
    else:
        from sglang.srt.layers.quantization.w8a8_int8 import W8A8Int8Config as config
    found: type[QuantizationConfig] = config
    return found


def _plain(
    files: Mapping[str, torch.Tensor], module_format: ModuleFormat, rows: Sequence[int], dtype: torch.dtype
) -> Tensors:
    return {"weight": files["weight"][0]}


def _packed(
    files: Mapping[str, torch.Tensor], module_format: ModuleFormat, rows: Sequence[int], dtype: torch.dtype
) -> Tensors:
    return {name: one[0] for name, one in marlin.to_marlin_source(files, module_format, dtype).items()}


def _blocks(
    files: Mapping[str, torch.Tensor], module_format: ModuleFormat, rows: Sequence[int], dtype: torch.dtype
) -> Tensors:
    return {"weight": files["weight"][0], "weight_scale_inv": row_scales(files, module_format, rows)[0]}


def _rows(
    files: Mapping[str, torch.Tensor], module_format: ModuleFormat, rows: Sequence[int], dtype: torch.dtype
) -> Tensors:
    return {"weight": files["weight"][0], "weight_scale": row_scales(files, module_format, rows)[0]}
