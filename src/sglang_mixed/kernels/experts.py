"""A mixture of experts on a CPU: only the experts that a batch chose run, each in its own format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"silu": F.silu, "gelu": F.gelu}


#: x [rows, in] -> [rows, out], the weight and its format bound.
Linear = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Expert:
    """gate and up [intermediate, hidden], a linear each or one for both stacked; down [hidden, intermediate]."""

    gate_up: Sequence[Linear]
    down: Linear


def moe(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    experts: Sequence[Expert],
    activation: str = "silu",
) -> torch.Tensor:
    """x [rows, hidden], ids and weights [rows, k] -> [rows, hidden]; id -1 is skipped.

    Products with the router's weights are in their dtype, as in SGLang, sums in float32.
    """
    activate, ids = ACTIVATIONS[activation], topk_ids.flatten()
    y = torch.zeros(x.shape, dtype=torch.float32)
    order = torch.argsort(ids, stable=True)
    rows, factors = order // topk_ids.shape[1], topk_weights.flatten()[order].unsqueeze(1)
    active, counts = torch.unique_consecutive(ids[order], return_counts=True)
    start = 0
    for index, count in zip(active.tolist(), counts.tolist(), strict=True):
        own, factor = rows[start : start + count], factors[start : start + count]
        start += count
        if index >= 0:
            gate, up = _halves(experts[index].gate_up, x[own])
            y.index_add_(0, own, experts[index].down(activate(gate).mul_(up)).to(factor.dtype).mul_(factor).float())
    return y.to(x.dtype)


def _halves(gate_up: Sequence[Linear], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    both = gate_up[0](x) if len(gate_up) == 1 else torch.cat([linear(x) for linear in gate_up], 1)
    gate, up = both.chunk(2, 1)
    return gate, up
