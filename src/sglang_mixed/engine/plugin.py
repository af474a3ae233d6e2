"""Entry point `sglang.srt.plugins`: everything that is hooked into SGLang, in one list."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def register() -> None:
    """Called once in every SGLang process. Nothing changes for a server that does not ask for mixed precision."""
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.layers.quantization import QUANTIZATION_METHODS
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from . import arguments, cpu_logits, routes
    from .cpu_platform import runs_on_torch_cpu
    from .quantization import NAME, MixedPrecisionQuantization

    arguments_path = "sglang.srt.server_args.ServerArgs"
    for target, hook in {
        f"{arguments_path}.add_cli_args": arguments.add_cli_args,
        f"{arguments_path}.from_cli_args": arguments.from_cli_args,
        "sglang.srt.model_loader.loader.get_model_loader": get_model_loader,
        "sglang.srt.managers.scheduler.Scheduler.get_internal_state": routes.get_internal_state,
        "sglang.srt.entrypoints.engine.Engine._launch_subprocesses": routes.launch_subprocesses,
    }.items():
        HookRegistry.register(target, hook, HookType.AROUND)
    if runs_on_torch_cpu():
        HookRegistry.register(
            "sglang.srt.layers.logits_processor.LogitsProcessor._compute_lm_head",
            cpu_logits.compute_lm_head,
            HookType.AROUND,
        )
    Engine.server_args_class = staticmethod(arguments.engine_arguments(Engine.server_args_class))
    # First in the table: SGLang lets the first method that claims a checkpoint's config have it.
    others = dict(QUANTIZATION_METHODS)
    QUANTIZATION_METHODS.clear()
    QUANTIZATION_METHODS.update({NAME: MixedPrecisionQuantization, **others})


def get_model_loader(original: Callable[..., Any], load_config: Any, *args: Any, **kwargs: Any) -> Any:
    """Our loader for a mixed model, SGLang's for any other."""
    from .loader import MixedPrecisionLoader

    mixed = kwargs.get("model_config", args[0] if args else None)
    if getattr(mixed, "quantization", None) == "mixed_precision" or "mixed_precision" in (
        load_config.model_loader_extra_config or {}
    ):
        return MixedPrecisionLoader(load_config)
    return original(load_config, *args, **kwargs)
