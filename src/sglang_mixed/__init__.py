"""True mixed precision for unmodified SGLang: one model, each weight from the checkpoint that already holds it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import compatibility

if TYPE_CHECKING:
    from .checkpoint import Checkpoint, open_checkpoint
    from .config import MixedPrecisionMap, load_map
    from .config import MixedPrecisionMap as MixedPrecisionConfig
    from .engine.python_api import SGLangMixedPrecisionLoader, get_global_true_mixed_precision_loader
    from .engine.python_api import SGLangMixedPrecisionLoader as TrueMixedPrecisionLoader
    from .engine.serving.statistics import (
        export_expert_activation_stats,
        get_expert_activation_stats,
        get_global_expert_tracker,
        get_mixed_precision_memory_stats,
        reset_expert_activation_stats,
    )
    from .errors import MixedPrecisionError
    from .experts import ExpertActivationTracker
    from .plan import Plan, make_plan
    from .torch import (
        DequantizationCache,
        EnhancedModelLoader,
        GPTQDequantizer,
        MixedPrecisionLinear,
        load_model_with_enhanced_features,
        load_plan,
    )
    from .torch import GPTQDequantizer as SGLangGPTQDequantizer
    from .torch.devices import (
        comprehensive_device_fix,
        fix_moe_device_issues,
        validate_model_device_consistency,
    )
    from .torch.masks import create_proper_attention_mask

    dequantize_gptq_weight = GPTQDequantizer.dequantize_gptq_weight
    is_gptq_weight = GPTQDequantizer.is_gptq_weight

_HOMES = {
    **compatibility.NAMES,
    "Checkpoint": "checkpoint",
    "open_checkpoint": "checkpoint",
    "MixedPrecisionMap": "config",
    "load_map": "config",
    "MixedPrecisionError": "errors",
    "Plan": "plan",
    "make_plan": "plan",
    "ExpertActivationTracker": "experts",
    "load_plan": "torch",
    "export_expert_activation_stats": "engine.serving.statistics",
    "get_expert_activation_stats": "engine.serving.statistics",
    "get_global_expert_tracker": "engine.serving.statistics",
    "get_mixed_precision_memory_stats": "engine.serving.statistics",
    "reset_expert_activation_stats": "engine.serving.statistics",
}
__all__ = [
    "Checkpoint",
    "DequantizationCache",
    "EnhancedModelLoader",
    "ExpertActivationTracker",
    "GPTQDequantizer",
    "MixedPrecisionConfig",
    "MixedPrecisionError",
    "MixedPrecisionLinear",
    "MixedPrecisionMap",
    "Plan",
    "SGLangGPTQDequantizer",
    "SGLangMixedPrecisionLoader",
    "TrueMixedPrecisionLoader",
    "comprehensive_device_fix",
    "create_proper_attention_mask",
    "dequantize_gptq_weight",
    "export_expert_activation_stats",
    "fix_moe_device_issues",
    "get_expert_activation_stats",
    "get_global_expert_tracker",
    "get_global_true_mixed_precision_loader",
    "get_mixed_precision_memory_stats",
    "is_gptq_weight",
    "load_map",
    "load_model_with_enhanced_features",
    "load_plan",
    "make_plan",
    "open_checkpoint",
    "reset_expert_activation_stats",
    "validate_model_device_consistency",
]


def __getattr__(name: str) -> Any:
    """The public names, imported on first use: SGLang imports this package in every process, whether used or not."""
    if name == "__version__":
        from importlib.metadata import version

        return version("sglang-mixed")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module
    from operator import attrgetter

    home, _, there = _HOMES[name].partition(":")
    return attrgetter(there or name)(import_module(f".{home}", __name__))


compatibility.install()
