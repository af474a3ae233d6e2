"""True mixed precision for unmodified SGLang: one model, each weight from the checkpoint that already holds it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import Checkpoint, open_checkpoint
    from .config import MixedPrecisionMap, load_map
    from .engine.statistics import (
        export_expert_activation_stats,
        get_expert_activation_stats,
        get_global_expert_tracker,
        get_mixed_precision_memory_stats,
        reset_expert_activation_stats,
    )
    from .errors import MixedPrecisionError
    from .experts import ExpertActivationTracker
    from .plan import Plan, make_plan

_HOMES = {
    "Checkpoint": "checkpoint",
    "open_checkpoint": "checkpoint",
    "MixedPrecisionMap": "config",
    "load_map": "config",
    "MixedPrecisionError": "errors",
    "Plan": "plan",
    "make_plan": "plan",
    "ExpertActivationTracker": "experts",
    "export_expert_activation_stats": "engine.statistics",
    "get_expert_activation_stats": "engine.statistics",
    "get_global_expert_tracker": "engine.statistics",
    "get_mixed_precision_memory_stats": "engine.statistics",
    "reset_expert_activation_stats": "engine.statistics",
}
__all__ = [
    "Checkpoint",
    "ExpertActivationTracker",
    "MixedPrecisionError",
    "MixedPrecisionMap",
    "Plan",
    "export_expert_activation_stats",
    "get_expert_activation_stats",
    "get_global_expert_tracker",
    "get_mixed_precision_memory_stats",
    "load_map",
    "make_plan",
    "open_checkpoint",
    "reset_expert_activation_stats",
]


def __getattr__(name: str) -> Any:
    """The public names, imported on first use: SGLang imports this package in every process, whether used or not."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
