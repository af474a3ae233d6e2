"""Counting the experts that a torch model's routers choose, by forward hooks."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from ..experts import ExpertActivationTracker
from ..plan.families import is_router
from .experts import MixedPrecisionExperts

_LAYER = re.compile(r"\.layers\.(\d+)\.")


def track_experts(model: torch.nn.Module, tracker: ExpertActivationTracker) -> list[RemovableHandle]:
    """Have every MoE layer's choices recorded; `remove()` on the handles ends it.

    A layer of experts is asked which it is given. Where experts are modules of their own, the router's logits
    [tokens, experts] are, whose `num_experts_per_tok` (or `top_k`) largest count. Layers without a number in their
    name are numbered in the model's order.
    """
    handles: list[RemovableHandle] = []
    for name, module in model.named_modules():
        number = int(found[1]) if (found := _LAYER.search(name)) else len(handles)
        if isinstance(module, MixedPrecisionExperts) or hasattr(module, "is_transposed"):
            handles.append(module.register_forward_pre_hook(_by_index(tracker, number), with_kwargs=True))
        elif is_router(f".{name}") and isinstance(_sibling(model, name), torch.nn.ModuleList):
            handles.append(module.register_forward_hook(_by_logits(tracker, number, _top_k(model, name))))
    return handles


def _sibling(model: torch.nn.Module, router: str) -> torch.nn.Module | None:
    return getattr(model.get_submodule(router.rpartition(".")[0]), "experts", None)


def _top_k(model: torch.nn.Module, router: str) -> int:
    parent = model.get_submodule(router.rpartition(".")[0])
    config = getattr(model, "config", None)
    return int(getattr(parent, "top_k", 0) or getattr(config, "num_experts_per_tok", 1))


def _by_index(tracker: ExpertActivationTracker, layer: int) -> Callable[..., None]:
    def record(module: torch.nn.Module, arguments: Any, named: dict[str, Any]) -> None:
        _record(tracker, layer, named["top_k_index"] if "top_k_index" in named else arguments[1])

    return record


def _by_logits(tracker: ExpertActivationTracker, layer: int, top_k: int) -> Callable[..., None]:
    def record(module: torch.nn.Module, arguments: Any, output: Any) -> None:
        logits = output if isinstance(output, torch.Tensor) else output[0]
        _record(tracker, layer, logits.topk(top_k, dim=-1).indices)

    return record


def _record(tracker: ExpertActivationTracker, layer: int, ids: torch.Tensor) -> None:
    experts, tokens = torch.unique(ids[ids >= 0], return_counts=True)
    for expert, count in zip(experts.tolist(), tokens.tolist(), strict=True):
        tracker.record_expert_activation(layer, expert, count)
