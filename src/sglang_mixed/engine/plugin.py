"""Entry point `sglang.srt.plugins`: everything that is hooked into SGLang, in one list."""

from __future__ import annotations

import functools
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

#: SGLang's function, by the names it has had since 0.5.15 -> what goes around it.
Hooks = dict[str | tuple[str, ...], Callable[..., Any]]


def register() -> None:
    """Called once in every SGLang process. Nothing changes for a server that does not ask for mixed precision."""
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.layers.quantization import QUANTIZATION_METHODS
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from . import arguments, state
    from .cpu import logits, ops, parallel
    from .cpu.platform import runs_on_torch_cpu
    from .layers import quantization

    needed, optional = _needed(), _optional()
    if runs_on_torch_cpu():
        needed["sglang.srt.layers.logits_processor.LogitsProcessor._compute_lm_head"] = logits.compute_lm_head
        needed.update(parallel.hooks())
        optional.update(ops.hooks())
        ATTENTION_BACKENDS["torch_native"] = ops.create_attention
    # SGLang would only log it, and serve without the hook.
    state.missing = missing(needed)
    for target, hook in _found({**needed, **optional}):
        owner, _, name = target.rpartition(".")
        if isinstance(cls := pkgutil.resolve_name(owner), type):
            wrap_method(cls, name, hook)
        else:
            HookRegistry.register(target, hook, HookType.AROUND)
    Engine.server_args_class = staticmethod(arguments.engine_arguments(Engine.server_args_class))
    # First in the table: SGLang lets the first method that claims a checkpoint's config have it.
    others = dict(QUANTIZATION_METHODS)
    QUANTIZATION_METHODS.clear()
    QUANTIZATION_METHODS.update({quantization.NAME: quantization.MixedPrecisionQuantization, **others})


def _needed() -> Hooks:
    """Without any of these no map is served."""
    from . import arguments, python_api
    from .loading import loader
    from .serving import questions, routes, tracking

    arguments_path = "sglang.srt.server_args.ServerArgs"
    runner_path = "sglang.srt.model_executor.model_runner.ModelRunner"
    worker_path = "sglang.srt.managers.tp_worker.BaseTpWorker"
    updater_path = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"
    return {
        f"{arguments_path}.add_cli_args": arguments.add_cli_args,
        f"{arguments_path}.from_cli_args": arguments.from_cli_args,
        "sglang.srt.model_loader.loader.get_model_loader": loader.get_model_loader,
        "sglang.srt.model_loader.loader.DefaultModelLoader.load_model": python_api.load_default,
        "sglang.srt.model_loader.utils.get_model_architecture": loader.get_model_architecture,
        f"{runner_path}.load_model": tracking.load_model,
        f"{runner_path}.forward": tracking.forward,
        "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new": tracking.init_batch,
        "sglang.srt.layers.moe.fused_moe_triton.layer.FusedMoE.forward_impl": tracking.forward_impl,
        **{
            (f"{worker_path}.update_weights_from_{origin}", f"{updater_path}.{method}"): loader.update_weights
            for origin, method in {
                "disk": "update_weights_from_disk",
                "distributed": "load_weights_from_distributed",
                "tensor": "update_weights_from_tensor",
                "ipc": "update_weights_from_ipc",
            }.items()
        },
        "sglang.srt.managers.scheduler.Scheduler.get_internal_state": questions.get_internal_state,
        "sglang.srt.entrypoints.engine.Engine._launch_subprocesses": routes.launch_subprocesses,
        "sglang.srt.utils.common.add_prometheus_middleware": routes.add_prometheus_middleware,
        "sglang.srt.utils.auth.decide_request_auth": routes.decide_request_auth,
        "uvicorn.run": routes.run_uvicorn,
    }


def _optional() -> Hooks:
    """What not every version has, which then needs no hook."""
    from .layers import quantization
    from .loading import loader

    manager_path = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
    return {
        f"{manager_path}.begin_weight_update": loader.begin_weight_update,
        "sglang.srt.models.gpt_oss.GptOssAttention.__init__": quantization.quantize_attention,
    }


def wrap_method(cls: type, name: str, hook: Callable[..., Any]) -> None:
    """Put the hook around a method as SGLang's registry does, but for what takes it a second in every process.

    It looks through all modules for copies of what it hooks; functions have some, these methods have none.
    """
    found = inspect.getattr_static(cls, name)
    original = getattr(found, "__func__", found)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return hook(original, *args, **kwargs)

    kind = type(found) if isinstance(found, (classmethod, staticmethod)) else None
    setattr(cls, name, kind(wrapped) if kind else wrapped)


def missing(hooks: Hooks) -> tuple[str, ...]:
    """Of each hook for which this SGLang has no function the newest name, the last."""
    return tuple(names[-1] for names in map(_names, hooks) if not any(map(_exists, names)))


def _names(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _found(hooks: Hooks) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Of each hook the first name that this SGLang has."""
    for names, hook in hooks.items():
        target = next(filter(_exists, _names(names)), None)
        if target is not None:
            yield target, hook


def _exists(target: str) -> bool:
    try:
        pkgutil.resolve_name(target)
    except (ImportError, AttributeError):
        return False
    return True
