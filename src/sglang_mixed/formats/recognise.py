"""Storage formats that are known by sight and not read yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import TensorInfo
from .gptq import is_gptq_layout


def recognise(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> str | None:
    """The name of the format these local tensors are in, for an error message; None for a format we never saw."""
    dtypes = {name: info.dtype for name, info in tensors.items()}
    if dtypes.get("weight_scale") == "F8_E4M3" and "U8" in dtypes.values():
        return "NVFP4"
    if "weight_packed" in dtypes:
        return "compressed-tensors " + str(config.get("format", "pack-quantized"))
    if any(name.endswith("_blocks") for name in dtypes) and "U8" in dtypes.values():
        return "MXFP4"
    if "weight_format" in dtypes or "SCB" in dtypes or any(name.startswith("weight.absmax") for name in dtypes):
        return "bitsandbytes"
    if "F8_E5M2" in dtypes.values():
        return "FP8 e5m2"
    return _packed(tensors, config) if "qweight" in dtypes else None


def _packed(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> str | None:
    if config.get("quant_method") == "auto-round" and "awq" not in str(config.get("packing_format")):
        return f"auto_round packing ({config.get('packing_format')})"
    if is_gptq_layout(tensors):
        return f"GPTQ in checkpoint_format {config.get('checkpoint_format')!r}"
    return "AWQ" if {"qzeros", "scales"} <= tensors.keys() else None
