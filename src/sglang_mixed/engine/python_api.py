"""SGLang's Python API with a map: `ModelConfig(mixed_precision_config=...)`, then `DefaultModelLoader.load_model`.

One process, no server: what a scheduler sets up before it loads a model is set up here where it is not yet.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sglang.srt.distributed import parallel_state
from sglang.srt.model_loader.loader import BaseModelLoader

from ..errors import MapError, UnsupportedError
from ..preflight import free_port
from . import state
from .arguments import translate
from .layers.quantization import NAME
from .loading.loader import MixedPrecisionLoader

#: Arguments of ModelConfig that a map's `inference` section may give.
_FROM_MAP = ("dtype", "context_length")


def init_model_config(
    original: Callable[..., None],
    config: Any,
    model_path: str,
    *args: Any,
    mixed_precision_config: str | Path | None,
    **kwargs: Any,
) -> None:
    """Instead of `ModelConfig.__init__` where a map is given: everything is planned and checked here.

    Raises what `make_plan` raises, and UnsupportedError for a `quantization` beside the map.
    """
    from sglang.srt.plugins import load_plugins

    load_plugins()
    if mixed_precision_config is None:
        original(config, model_path, *args, **kwargs)
        return
    if kwargs.get("quantization") not in (None, NAME):
        raise UnsupportedError(
            f"quantization={kwargs['quantization']!r} beside a map",
            rule="the map alone decides how each weight is stored",
            remedy="leave quantization out",
        )
    asked = {"enable_mixed_precision": True, "mixed_precision_config": str(mixed_precision_config)}
    overrides = translate({"model_path": model_path, **asked, "disable_expert_tracking": True}, set())
    for name in _FROM_MAP:
        if name in overrides and kwargs.get(name) in (None, "auto"):
            kwargs[name] = overrides[name]
    original(config, model_path, *args, **kwargs | {"quantization": NAME})
    config.mixed_precision_config = str(mixed_precision_config)
    config.mixed_precision_request = json.loads(overrides["model_loader_extra_config"])[NAME]


def load_default(original: Callable[..., Any], loader: Any, *, model_config: Any, device_config: Any) -> Any:
    """Hook around `DefaultModelLoader.load_model`: the mix, for a config that was made with a map."""
    if isinstance(loader, MixedPrecisionLoader) or not hasattr(model_config, "mixed_precision_request"):
        return original(loader, model_config=model_config, device_config=device_config)
    return load_mixed(loader.load_config, model_config, device_config)


def load_mixed(load_config: Any, model_config: Any, device_config: Any) -> torch.nn.Module:
    """Load the mix that a ModelConfig describes into SGLang's model, in this process.

    Raises what loading raises below EngineError.
    """
    ensure_parallel_state(model_config, str(torch.device(device_config.device)))
    extra = {**(load_config.model_loader_extra_config or {}), NAME: model_config.mixed_precision_request}
    state.loader = MixedPrecisionLoader(dataclasses.replace(load_config, model_loader_extra_config=extra))
    return state.loader.load_model(model_config=model_config, device_config=device_config)


class SGLangMixedPrecisionLoader(BaseModelLoader):
    """SGLang's loader protocol, for a ModelConfig that was made with `mixed_precision_config`."""

    def download_model(self, model_config: Any) -> None:
        """All sources are local folders."""

    def load_model(self, *, model_config: Any, device_config: Any) -> torch.nn.Module:
        """SGLang's model, filled from the map. Raises MapError for a config without one, and as `load_mixed`."""
        if not hasattr(model_config, "mixed_precision_request"):
            raise MapError("the ModelConfig has no map", remedy="ModelConfig(..., mixed_precision_config='map.yaml')")
        return load_mixed(self.load_config, model_config, device_config)

    @staticmethod
    def get_memory_stats() -> dict[str, Any]:
        """As `get_mixed_precision_memory_stats`."""
        from .serving.statistics import get_mixed_precision_memory_stats

        return get_mixed_precision_memory_stats()


def get_global_true_mixed_precision_loader() -> MixedPrecisionLoader | None:
    """The loader of the mix that was loaded in this process; None before one was."""
    return state.loader


def ensure_parallel_state(model_config: Any, device: str) -> None:
    """One rank of everything, where the process is not a rank of something already."""
    if parallel_state.model_parallel_is_initialized():
        return
    from sglang.srt.layers.dp_attention import initialize_dp_attention
    from sglang.srt.layers.moe import initialize_moe_config
    from sglang.srt.server_args import ServerArgs

    arguments = ServerArgs(model_path=model_config.model_path, quantization=NAME, device=device)
    publish_as_only_rank(arguments)
    call_as_known(initialize_moe_config, arguments)
    parallel_state.init_distributed_environment(
        backend="gloo" if device == "cpu" else "nccl",
        world_size=1,
        rank=0,
        local_rank=0,
        distributed_init_method=f"tcp://127.0.0.1:{free_port()}",
    )
    parallel_state.initialize_model_parallel()
    call_as_known(initialize_dp_attention, arguments, model_config)


def publish_as_only_rank(arguments: Any) -> None:
    """Make these ServerArgs this process's, as a scheduler would, and it the one rank of everything."""
    from sglang.srt import runtime_context, server_args

    if hasattr(arguments, "resolve_once"):  # since 0.5.19
        arguments.resolve_once()
    if not hasattr(runtime_context, "SpawnRanks"):  # before 0.5.21
        server_args.set_global_server_args_for_scheduler(arguments)
        return
    device = torch.cuda.current_device() if torch.cuda.is_available() else 0
    runtime_context.publish(arguments, role="scheduler", ranks=runtime_context.SpawnRanks(world_rank=0, gpu_id=device))


def call_as_known(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call with as many of the arguments as this SGLang's function takes; later versions find the others themselves."""
    return function(*arguments[: len(inspect.signature(function).parameters)])
