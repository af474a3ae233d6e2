"""A map in any torch.nn.Module, without an engine."""

from .cache import DequantizationCache
from .experts import MixedPrecisionExperts
from .gptq import GPTQDequantizer
from .linear import MixedPrecisionLinear
from .loader import EnhancedModelLoader, load_model_with_enhanced_features
from .model import LoadReport, load_plan, memory_stats

__all__ = [
    "DequantizationCache",
    "EnhancedModelLoader",
    "GPTQDequantizer",
    "LoadReport",
    "MixedPrecisionExperts",
    "MixedPrecisionLinear",
    "load_model_with_enhanced_features",
    "load_plan",
    "memory_stats",
]
