"""SGLang asks, per module prefix, how a layer is quantized; the plan answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from ...errors import CoverageError, UnsupportedError
from ...plan import PlannedModule
from ...plan.families import is_reordered
from .. import state
from ..cpu.platform import runs_on_torch_cpu
from ..names import expert_modules, fused_parts
from .linear import CPULinearMethod
from .moe import CPUMoEMethod
from .stock_methods import StockMethods

NAME = "mixed_precision"


class MixedPrecisionQuantization(QuantizationConfig):
    """`quantization="mixed_precision"`: one method per layer, from the plan that is being loaded."""

    @property
    def _loading(self) -> state.Loading:
        # SGLang also makes a config to look at before it loads; only a load in progress has a plan.
        return state.current_loading()

    @cached_property
    def _stock(self) -> StockMethods | None:
        if runs_on_torch_cpu():
            return None
        return StockMethods(self._loading.plan)

    @cached_property
    def _parents(self) -> set[str]:
        return {name.rpartition(".")[0] for name in self._planned}

    def _checkpoint_name(self, prefix: str) -> str:
        """SGLang's Mixtral leaves out the `model.` of its layers' names."""
        is_known = any(parent.startswith(prefix.rpartition(".")[0]) for parent in self._parents)
        return prefix if is_known else f"model.{prefix}"

    @property
    def _planned(self) -> Mapping[str, PlannedModule]:
        return self._loading.plan.plan.modules

    @classmethod
    def get_name(cls) -> str:
        """Name in SGLang's registry."""
        return NAME

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Activation dtypes: what each format's own kernel takes is checked where it is built."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """CUDA capability: each format's own method checks its own."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: the plan is all there is."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MixedPrecisionQuantization:
        """The base checkpoint's own quantization config is not used; the plan has read it."""
        return cls()

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: Any, user_quant: str | None) -> str | None:
        """Keep our name whatever method the base checkpoint's config names."""
        return NAME if user_quant == NAME else None

    def get_scaled_act_names(self) -> list[str]:
        """No activation is rescaled."""
        return []

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """SGLang's method for this layer; None leaves SGLang's default."""
        prefix = self._checkpoint_name(prefix)
        if isinstance(layer, FusedMoE):
            return self._moe_method(layer, prefix)
        if isinstance(layer, LinearBase):
            return self._linear_method(prefix)
        return None

    def update_packed_modules_mapping(self, mapping: dict[str, list[str]]) -> None:
        """Some models tell which of their layers are fused; their parts are known here by name."""
        self.packed_modules_mapping.update(mapping)

    def _linear_method(self, prefix: str) -> QuantizeMethodBase:
        parts = [self._module(name) for _, name in fused_parts(prefix, self._planned)]
        if self._stock is None:
            return CPULinearMethod(parts)
        plan = self._loading.plan.plan
        if any(is_reordered(part.name, plan.checkpoints[plan.base].config) for part in parts):
            raise UnsupportedError(
                "SGLang reorders the rows of this model's query and key projections, in 16 bits only",
                tensor=prefix,
                remedy="serve this model's mix on the CPU",
            )
        return self._stock.linear(prefix, parts)

    def _moe_method(self, layer: FusedMoE, prefix: str) -> QuantizeMethodBase | None:
        if prefix in self._planned:
            raise UnsupportedError(
                "all experts of a layer are in one tensor, in a layout that is not known here",
                tensor=prefix,
                remedy="take a checkpoint that holds every expert by itself",
            )
        names = [expert_modules(prefix, index, self._planned) for index in range(layer.num_experts)]
        experts = [(self._module(gate), self._module(up), self._module(down)) for gate, up, down in names]
        local = [one for one in experts if one[0].name in self._loading.plan.parts]
        return CPUMoEMethod(prefix, local) if self._stock is None else self._stock.experts(prefix, local)

    def _module(self, name: str) -> PlannedModule:
        try:
            return self._planned[name]
        except KeyError:
            raise CoverageError(
                "the engine builds a layer that the plan does not hold",
                tensor=name,
                rule="config.json of the base describes the weights in its files",
                remedy="check num_hidden_layers, num_experts and architectures in config.json",
            ) from None


def quantize_attention(original: Callable[..., None], *args: Any, quant_config: Any = None, **kwargs: Any) -> None:
    """Hook around the constructor of GPT-OSS's attention, which its model never tells how it is quantized."""
    if quant_config is None and state.loading is not None:
        quant_config = MixedPrecisionQuantization()
    original(*args, quant_config=quant_config, **kwargs)
