"""The statistics as the first users know them: `expert_stats`, `layer_stats` and `top_experts`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from .counts import ExpertCounts


class ExpertActivity(NamedTuple):
    """What one expert did. `last_activation_time` is in unix seconds, 0 for never.

    On a server every token that is routed to the expert is one activation.
    """

    layer_id: int
    expert_id: int
    activation_count: int
    last_activation_time: float
    total_tokens_processed: int


def activities(counts: ExpertCounts) -> tuple[ExpertActivity, ...]:
    """Every expert of every layer, idle ones too."""
    rows = zip(counts.layers, counts.total.tolist(), counts.last_active.tolist(), strict=True)
    return tuple(
        ExpertActivity(layer, expert, tokens, last, tokens)
        for layer, totals, times in rows
        for expert, (tokens, last) in enumerate(zip(totals, times, strict=True))
    )


def expert_stats(experts: Iterable[ExpertActivity]) -> dict[str, dict[str, Any]]:
    """`layer_L_expert_E` -> the five fields of an activity."""
    return {f"layer_{one.layer_id}_expert_{one.expert_id}": one._asdict() for one in experts}


def layer_stats(experts: Iterable[ExpertActivity]) -> dict[int, dict[str, Any]]:
    """Layer -> its totals, and those of each of its experts. As JSON, the numbers become strings."""
    layers: dict[int, dict[str, Any]] = {}
    for one in experts:
        layer = layers.setdefault(
            one.layer_id, {"total_experts": 0, "total_activations": 0, "total_tokens": 0, "experts": {}}
        )
        layer["total_experts"] += 1
        layer["total_activations"] += one.activation_count
        layer["total_tokens"] += one.total_tokens_processed
        layer["experts"][one.expert_id] = {
            "activation_count": one.activation_count,
            "total_tokens_processed": one.total_tokens_processed,
        }
    return layers


def top_experts(experts: Iterable[ExpertActivity], top_k: int = 10) -> list[dict[str, Any]]:
    """The `top_k` most activated experts, the first layer's and lowest expert's first among equals."""
    ranked = sorted(experts, key=lambda one: (-one.activation_count, one.layer_id, one.expert_id))
    return [
        {key: value for key, value in one._asdict().items() if key != "last_activation_time"}
        for one in ranked[: max(top_k, 0)]
    ]
