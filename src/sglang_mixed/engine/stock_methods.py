"""Layers on an accelerator: SGLang's own quantization method for each format, from each source's own config."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.quantization import QUANTIZATION_METHODS
from sglang.srt.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

from ..checkpoint import Checkpoint
from ..errors import UnsupportedError
from ..plan import PlannedModule


class StockMethods:
    """One SGLang quantization config per source, asked per layer."""

    def __init__(self, checkpoints: Mapping[str, Checkpoint], packed_modules: dict[str, list[str]]) -> None:
        self._checkpoints, self._packed_modules = checkpoints, packed_modules
        self._configs: dict[str, QuantizationConfig] = {}

    def method(self, layer: torch.nn.Module, prefix: str, module: PlannedModule) -> QuantizeMethodBase | None:
        """SGLang's method for a layer whose weights are stored as `module` is; None is its 16-bit default."""
        if module.format.name == "plain":
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        method = self._config(module).get_quant_method(layer, prefix)
        if method is None or type(method).__name__.startswith("Unquantized"):
            raise UnsupportedError(
                f"SGLang would serve this layer in 16 bits, the plan says {module.format.name} from {module.source}",
                tensor=module.name,
                remedy="map this module to a source in a format that this SGLang has a kernel for",
            )
        return method

    def _config(self, module: PlannedModule) -> QuantizationConfig:
        if module.source not in self._configs:
            config = self._configs[module.source] = _build(self._checkpoints[module.source], module)
            config.packed_modules_mapping = self._packed_modules
        return self._configs[module.source]


def _build(checkpoint: Checkpoint, module: PlannedModule) -> QuantizationConfig:
    described = copy.deepcopy(dict(checkpoint.quantization))
    claims = (method.override_quantization_method(described, None) for method in QUANTIZATION_METHODS.values())
    name = next(filter(None, claims), described.get("quant_method"))
    if name not in QUANTIZATION_METHODS:
        raise UnsupportedError(
            f"this SGLang has no quantization method {name!r}",
            file=checkpoint.path / "config.json",
            tensor=module.name,
            remedy=f"use a source in one of: {', '.join(sorted(QUANTIZATION_METHODS))}",
        )
    return QUANTIZATION_METHODS[name].from_config(described)


def match_expert_scales(model: torch.nn.Module) -> None:
    """Marlin's MoE kernel wants scales in the activations' dtype; SGLang makes them FP16 whatever that is."""
    for layer in model.modules():
        for name in ("w13_scales", "w2_scales"):
            scales = getattr(layer, name, None) if isinstance(layer, FusedMoE) else None
            if scales is not None and scales.dtype != layer.params_dtype:
                scales.data = scales.data.to(layer.params_dtype)
