"""Storage formats that are known by sight and not read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .awq import layout_name
from .base import TensorInfo
from .gptq import is_gptq_layout


def recognise(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> str | None:
    """The name of the format these local tensors are in, for an error message; None for a format we never saw."""
    dtypes = {name: info.dtype for name, info in tensors.items()}
    if "pre_quant_scale" in dtypes:
        return "ModelOpt's AWQ, which scales inputs too (pre_quant_scale),"
    if any(name.endswith("_blocks") for name in dtypes):
        return "MXFP4 with a layer's experts in one tensor, as GPT-OSS stacks them,"
    if "weight_packed" in dtypes or "bitmask" in dtypes:
        return f"{config.get('quant_method')} in format {config.get('format') or config.get('packing_format')}"
    if "weight_format" in dtypes or "SCB" in dtypes or any(name.startswith("weight.absmax") for name in dtypes):
        return "bitsandbytes"
    if "F8_E5M2" in dtypes.values():
        return "FP8 e5m2"
    return _packed(tensors, config) if "qweight" in dtypes else None


def _packed(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> str:
    method = config.get("quant_method")
    if method == "auto-round":
        return f"AutoRound's packing_format {config.get('packing_format')!r}"
    if method == "awq":
        return f"AWQ in the layout {layout_name(config)!r}"
    named = config.get("checkpoint_format" if is_gptq_layout(tensors) else "quant_method")
    return f"packed integers of {method or 'no quant_method'} ({named!r})"
