"""MoE layers on the CPU: every expert's matrices compressed at rest, a loop over the experts that have tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput
from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase

from ...errors import UnsupportedError
from ...kernels.experts import ACTIVATIONS, Activation, Biases, Expert, clamped_swiglu, moe
from ...plan import PlannedModule
from .. import state
from ..loading.intake import Intake
from .linear import check_shape

#: One expert's modules in SGLang's order: w1 (gate), w3 (up), w2 (down).
ExpertModules = tuple[PlannedModule, PlannedModule, PlannedModule]


class CPUMoEMethod(FusedMoEMethodBase):
    """SGLang's MoE method over our CPU kernels."""

    def __init__(self, prefix: str, experts: list[ExpertModules]) -> None:
        self._prefix, self._modules = prefix, experts
        self.intake = Intake()
        self._experts: list[Expert] = []
        self._activate: Activation = ACTIVATIONS["silu"]

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
        check_experts(self._prefix, self._modules, num_experts, bool(extra_weight_attrs.get("with_bias")))
        for gate, up, down in self._modules:
            check_shape([gate, up], [intermediate_size_per_partition] * 2, hidden_size)
            check_shape([down], [hidden_size], intermediate_size_per_partition)
            gate_up = self.intake.open([gate, up])
            downs = self.intake.open([down])
            biases = Biases(*map(self.intake.open_bias, (gate, up, down)))
            if not _adds_bias():
                biases = biases._replace(down=None)
            self._experts.append(Expert([weight.linear for weight in gate_up], downs[0].linear, biases))

    def create_moe_runner(self, layer: torch.nn.Module, moe_runner_config: Any) -> None:
        """There is no runner: `apply` computes."""
        config, is_clamped = moe_runner_config, moe_runner_config.gemm1_alpha is not None
        wanted = ("apply_router_weight_on_input", "no_combine", "swiglu_limit", "gemm1_clamp_limit")
        unsupported = [name for name in wanted[: 3 if is_clamped else 4] if getattr(config, name, None)]
        if unsupported or config.activation not in (("silu",) if is_clamped else ACTIVATIONS):
            raise UnsupportedError(
                f"this model's experts need {', '.join(unsupported) or config.activation}",
                tensor=self._prefix,
                rule="the CPU kernels compute gated SiLU or GELU experts, and GPT-OSS's clamped ones",
            )
        self._activate = ACTIVATIONS[config.activation]
        if is_clamped:
            self._activate = clamped_swiglu(config.gemm1_alpha, config.gemm1_clamp_limit)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """The weights were packed as they arrived."""

    def apply(self, layer: torch.nn.Module, dispatch_output: Any) -> StandardCombineInput:
        """Hidden states [tokens, hidden] and their top-k experts -> weighted sums [tokens, hidden]."""
        weights, ids, _ = dispatch_output.topk_output
        output = moe(dispatch_output.hidden_states, ids, weights, self._experts, self._activate)
        return StandardCombineInput(hidden_states=output)


def _adds_bias() -> bool:
    """Whether this rank's part of an expert's output brings its bias: the sum over ranks has it once."""
    rank = state.current_loading().plan.rank
    return rank.number % rank.expert_tp == 0


def check_experts(prefix: str, experts: Sequence[ExpertModules], num_experts: int, with_bias: bool) -> None:
    """Raise UnsupportedError unless the plan's experts of this rank are all that the engine asks for."""
    biased = [module.bias is not None for expert in experts for module in expert]
    if num_experts != len(experts) or set(biased) != {with_bias}:
        raise UnsupportedError(
            f"the engine asks for {num_experts} experts with{'' if with_bias else 'out'} biases on this rank, "
            f"the plan gives it {len(experts)}, with biases in {biased.count(True)} of their matrices",
            tensor=prefix,
            rule="experts are shared out in equal runs, none redundant or fused; all have biases or none has",
        )
