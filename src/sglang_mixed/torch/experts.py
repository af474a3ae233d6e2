"""`MixedPrecisionExperts`: all experts of a layer, each matrix compressed in a format of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ..errors import UnsupportedError
from ..kernels.experts import Activation, Biases, Expert, moe
from .cache import DequantizationCache
from .linear import CompressedModule
from .matrix import CompressedMatrix


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """gate and up [intermediate, hidden], a matrix each or one for both stacked; down [hidden, intermediate].

    `biases` are those of gate, up and down, [out] each; none or all three.
    """

    gate_up: Sequence[CompressedMatrix]
    down: CompressedMatrix
    biases: Sequence[torch.Tensor] = ()


class MixedPrecisionExperts(CompressedModule):
    """In the place of a transformers experts module, whose activation it keeps.

    (x [tokens, hidden], top_k_index [tokens, k], top_k_weights [tokens, k]) -> [tokens, hidden]; an index of another
    expert than these, -1 among them, is skipped. Only experts that were chosen run; sums are in float32.
    """

    def __init__(
        self, experts: Sequence[ExpertWeights], activate: Activation, cache: DequantizationCache | None = None
    ) -> None:
        super().__init__([matrix for one in experts for matrix in (*one.gate_up, one.down)], cache)
        self.num_experts, self._activate = len(experts), activate
        self._experts = [self._expert(number, one) for number, one in enumerate(experts)]

    def _expert(self, number: int, weights: ExpertWeights) -> Expert:
        biases = [torch.nn.Parameter(bias, requires_grad=False) for bias in weights.biases]
        for name, bias in zip(Biases._fields, biases, strict=bool(biases)):
            self.register_parameter(f"{name}_bias_{number}", bias)
        *gate_up, down = (partial(matrix.linear, cache=self.cache) for matrix in (*weights.gate_up, weights.down))
        return Expert(gate_up, down, Biases(*biases))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum of the chosen experts' outputs."""
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        ids = top_k_index.masked_fill(top_k_index >= self.num_experts, -1)
        return moe(rows, ids, top_k_weights, self._experts, self._activate).reshape(hidden_states.shape)


def activation_of(module: torch.nn.Module) -> Activation:
    """What a transformers experts module does between its products. Raises UnsupportedError for one without a gate."""
    if not getattr(module, "has_gate", True):
        raise UnsupportedError("experts without a gate", rule="an expert computes down(act(gate(x)) * up(x))")
    apply_gate = getattr(module, "_apply_gate", None)
    if apply_gate is None:
        act_fn: Callable[[torch.Tensor], torch.Tensor] = module.act_fn  # type: ignore[assignment]
        return lambda gate, up: act_fn(gate) * up
    if getattr(module, "is_concatenated", True):
        return lambda gate, up: apply_gate(torch.cat((gate, up), dim=-1))
    return lambda gate, up: apply_gate(torch.stack((gate, up), dim=-1).flatten(-2))
