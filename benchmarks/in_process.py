"""SGLang's loaders in this process, on one rank, without a scheduler."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.plugins import load_plugins

load_plugins()

from sglang.srt.configs.device_config import DeviceConfig  # noqa: E402
from sglang.srt.configs.load_config import LoadConfig  # noqa: E402
from sglang.srt.configs.model_config import ModelConfig  # noqa: E402
from sglang.srt.distributed.parallel_state import (  # noqa: E402
    init_distributed_environment,
    initialize_model_parallel,
)
from sglang.srt.entrypoints.engine import Engine  # noqa: E402
from sglang.srt.layers.dp_attention import initialize_dp_attention  # noqa: E402
from sglang.srt.model_loader.loader import get_model_loader  # noqa: E402
from sglang.srt.model_loader.utils import get_model_architecture  # noqa: E402
from sglang.srt.runtime_context import publish  # noqa: E402

from sglang_mixed.preflight import free_port  # noqa: E402


def prepare(**arguments: Any) -> Any:
    """A function that loads the model these engine arguments describe; everything is imported before it is called."""
    server_args = Engine.server_args_class(log_level="error", **arguments)
    publish(server_args, role="scheduler")
    model_config = ModelConfig.from_server_args(server_args)
    get_model_architecture(model_config)
    _initialize_world()
    initialize_dp_attention(server_args=server_args, model_config=model_config)
    load_config = LoadConfig(load_format="auto", model_loader_extra_config=server_args.model_loader_extra_config)

    def load() -> torch.nn.Module:
        loader = get_model_loader(load_config, model_config)
        model: torch.nn.Module = loader.load_model(model_config=model_config, device_config=DeviceConfig("cpu"))
        return model

    return load


def _initialize_world() -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    init_distributed_environment(backend="gloo", world_size=1, rank=0, local_rank=0, distributed_init_method=address)
    initialize_model_parallel()
