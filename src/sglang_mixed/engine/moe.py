"""MoE layers on the CPU: every expert's matrices compressed at rest, a loop over the experts that have tokens."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput
from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase

from ..errors import UnsupportedError
from ..kernels.experts import Expert, moe
from ..plan import PlannedModule
from .intake import Intake
from .linear import check_shape

#: One expert's modules in SGLang's order: w1 (gate), w3 (up), w2 (down).
ExpertModules = tuple[PlannedModule, PlannedModule, PlannedModule]


class CPUMoEMethod(FusedMoEMethodBase):
    """SGLang's MoE method over our CPU kernels."""

    def __init__(self, prefix: str, experts: list[ExpertModules]) -> None:
        self._prefix, self._modules = prefix, experts
        self.intake = Intake()
        self._experts: list[Expert] = []
        self._activation = "silu"

    def create_weights(
        self,
        layer: torch.nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Expect every local expert's tensors, each in its own format."""
        if num_experts != len(self._modules) or extra_weight_attrs.get("with_bias"):
            raise UnsupportedError(
                f"the engine asks for {num_experts} experts on this rank, the plan gives it {len(self._modules)}",
                tensor=self._prefix,
                rule="experts are shared out in equal runs, none redundant or fused, and have no biases",
            )
        for gate, up, down in self._modules:
            check_shape([gate, up], [intermediate_size_per_partition] * 2, hidden_size)
            check_shape([down], [hidden_size], intermediate_size_per_partition)
            gate_up = self.intake.open([gate, up])
            downs = self.intake.open([down])
            self._experts.append(Expert([weight.linear for weight in gate_up], downs[0].linear))

    def create_moe_runner(self, layer: torch.nn.Module, moe_runner_config: Any) -> None:
        """There is no runner: `apply` computes."""
        unsupported = [
            name
            for name in ("apply_router_weight_on_input", "no_combine", "gemm1_alpha", "swiglu_limit")
            if getattr(moe_runner_config, name, None)
        ]
        if unsupported or moe_runner_config.activation not in ("silu", "gelu"):
            raise UnsupportedError(
                f"this model's experts need {', '.join(unsupported) or moe_runner_config.activation}",
                tensor=self._prefix,
                rule="the CPU kernels compute gated SiLU or GELU experts",
            )
        self._activation = moe_runner_config.activation

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """The weights were packed as they arrived."""

    def apply(self, layer: torch.nn.Module, dispatch_output: Any) -> StandardCombineInput:
        """Hidden states [tokens, hidden] and their top-k experts -> weighted sums [tokens, hidden]."""
        weights, ids, _ = dispatch_output.topk_output
        output = moe(dispatch_output.hidden_states, ids, weights, self._experts, self._activation)
        return StandardCombineInput(hidden_states=output)
