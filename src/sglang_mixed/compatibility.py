"""The names that the first users know, when this was a fork of SGLang: thin names for what stands in other rooms.

Nothing is imported before it is asked for. The fork's module paths (`sglang.srt.layers.mixed_precision_linear`, ...)
resolve once this package is imported, which SGLang's plugin does too.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

#: Name -> "module" or "module:name there", with dots for what a class holds.
NAMES: dict[str, str] = {
    "DequantizationCache": "torch",
    "EnhancedModelLoader": "torch",
    "GPTQDequantizer": "torch",
    "MixedPrecisionConfig": "config:MixedPrecisionMap",
    "MixedPrecisionLinear": "torch",
    "SGLangGPTQDequantizer": "torch:GPTQDequantizer",
    "SGLangMixedPrecisionLoader": "engine.python_api",
    "TrueMixedPrecisionLoader": "engine.python_api:SGLangMixedPrecisionLoader",
    "comprehensive_device_fix": "torch.devices",
    "create_proper_attention_mask": "torch.masks",
    "dequantize_gptq_weight": "torch:GPTQDequantizer.dequantize_gptq_weight",
    "fix_moe_device_issues": "torch.devices",
    "get_global_true_mixed_precision_loader": "engine.python_api",
    "is_gptq_weight": "torch:GPTQDequantizer.is_gptq_weight",
    "load_model_with_enhanced_features": "torch",
    "validate_model_device_consistency": "torch.devices",
}

#: The fork's modules. Each gives every public name of this package.
MODULES = frozenset(
    (
        "fix_device_issues",
        "sglang.srt.enhanced_model_loader",
        "sglang.srt.layers.mixed_precision_linear",
        "sglang.srt.model_loader.enhanced_mixed_precision_loader",
        "sglang.srt.model_loader.sglang_mixed_precision_loader",
        "sglang.srt.model_loader.true_mixed_precision_loader",
        "sglang.srt.models.moe_tracker",
    )
)
_MODEL_CONFIG = "sglang.srt.configs.model_config"


def install() -> None:
    """Let Python find the fork's modules, and SGLang's ModelConfig take a map."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
        if module := sys.modules.get(_MODEL_CONFIG):
            _accept_map(module)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in MODULES:
            return ModuleSpec(fullname, _Historical(), origin=__name__)
        if fullname != _MODEL_CONFIG:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_accept(module: ModuleType) -> None:
                execute(module)
                _accept_map(module)

            spec.loader.exec_module = execute_and_accept  # type: ignore[method-assign]
        return spec


class _Historical(Loader):
    def exec_module(self, module: ModuleType) -> None:
        def get(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return getattr(importlib.import_module(__package__), name)

        module.__getattr__ = get  # type: ignore[method-assign]


def _accept_map(module: ModuleType) -> None:
    """Have `ModelConfig` take `mixed_precision_config`. Only a call with it loads anything of ours."""
    original: Callable[..., None] = module.ModelConfig.__init__

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if "mixed_precision_config" in kwargs:
            ours = importlib.import_module(f"{__package__}.engine.python_api")
            ours.init_model_config(original, self, *args, **kwargs)
        else:
            original(self, *args, **kwargs)

    module.ModelConfig.__init__ = init
