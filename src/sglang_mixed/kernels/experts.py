"""A mixture of experts on a CPU: only the experts that a batch chose run, each in its own format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

#: x [rows, in] -> [rows, out], the weight and its format bound.
Linear = Callable[[torch.Tensor], torch.Tensor]
#: gate and up [rows, intermediate] -> [rows, intermediate]; may overwrite them.
Activation = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "silu": lambda gate, up: F.silu(gate).mul_(up),
    "gelu": lambda gate, up: F.gelu(gate).mul_(up),
}


def clamped_swiglu(alpha: float, limit: float) -> Activation:
    """GPT-OSS's: gate at most `limit`, up within it, gate * sigmoid(alpha * gate) * (up + 1), each step rounded."""

    def activate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate = gate.clamp_(max=limit)
        return torch.sigmoid(gate * alpha).mul_(gate).mul_(up.clamp_(-limit, limit).add_(1))

    return activate


class Biases(NamedTuple):
    """What is added to an expert's products, [out] each, in any float dtype."""

    gate: torch.Tensor | None = None
    up: torch.Tensor | None = None
    down: torch.Tensor | None = None


NO_BIASES = Biases()


@dataclass(frozen=True, slots=True, eq=False)
class Expert:
    """gate and up [intermediate, hidden], a linear each or one for both stacked; down [hidden, intermediate]."""

    gate_up: Sequence[Linear]
    down: Linear
    biases: Biases = NO_BIASES


def moe(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    experts: Sequence[Expert],
    activate: Activation = ACTIVATIONS["silu"],
) -> torch.Tensor:
    """x [rows, hidden], ids and weights [rows, k] -> [rows, hidden]; id -1 is skipped.

    Products with the router's weights are in their dtype, as in SGLang, sums in float32.
    """
    ids = topk_ids.flatten()
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    order = torch.argsort(ids, stable=True)
    rows, factors = order // topk_ids.shape[1], topk_weights.flatten()[order].unsqueeze(1)
    active, counts = torch.unique_consecutive(ids[order], return_counts=True)
    start = 0
    for index, count in zip(active.tolist(), counts.tolist(), strict=True):
        own, factor = rows[start : start + count], factors[start : start + count]
        start += count
        if index >= 0:
            output = _forward(experts[index], x[own], activate)
            y.index_add_(0, own, output.to(factor.dtype).mul_(factor).float())
    return y.to(x.dtype)


def _forward(expert: Expert, x: torch.Tensor, activate: Activation) -> torch.Tensor:
    biases, (gate, up) = expert.biases, _halves(expert.gate_up, x)
    return _plus(expert.down(activate(_plus(gate, biases.gate), _plus(up, biases.up))), biases.down)


def _plus(product: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The sum as SGLang rounds it: the product, then the sum."""
    return product if bias is None else (product.float() + bias.float()).to(product.dtype)


def _halves(gate_up: Sequence[Linear], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    both = gate_up[0](x) if len(gate_up) == 1 else torch.cat([linear(x) for linear in gate_up], 1)
    gate, up = both.chunk(2, 1)
    return gate, up
