"""A whole model that our loader fills with the GPU's methods, in one process on the CPU, with stand-ins for kernels."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sglang_mixed.digests import leaves_of

if TYPE_CHECKING:
    from .stand_ins import Replace

CODE = "from tests.engine.gpu_model import main; main()"


def main() -> None:
    """Read a map's path; write the proof's report, and how far the first MoE layer is from the dequantized one."""
    path, answered = sys.argv[1:]
    model = load(path)
    from sglang_mixed.engine import state

    assert state.proof is not None
    deadline = time.monotonic() + 60
    while (report := state.proof.report())["verification"]["state"] == "running" and time.monotonic() < deadline:
        time.sleep(0.05)
    report["kernel_tensors"] = [name for name, _ in model.named_parameters()]
    report["error"] = experts_error(model, path)
    Path(answered).write_text(json.dumps(report))


def load(path: str) -> Any:
    """The model as SGLang's model runner has it loaded."""
    from sglang.srt.configs.device_config import DeviceConfig
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.model_loader import loader as sglang_loader
    from sglang.srt.plugins import load_plugins

    from .launch import TINY

    load_plugins()
    replace_gpu()
    arguments: Any = Engine.server_args_class(
        model_path=str(TINY / "bf16"), enable_mixed_precision=True, mixed_precision_config=path, dtype="bfloat16"
    )
    config = start_sglang(arguments, "gloo")
    load_config = LoadConfig(model_loader_extra_config=arguments.model_loader_extra_config)
    chosen = sglang_loader.get_model_loader(load_config, config)
    return chosen.load_model(model_config=config, device_config=DeviceConfig("cpu"))


def replace_gpu() -> None:
    """Have our loader and methods believe in a GPU whose kernels are stand-ins."""
    from sglang_mixed.engine.layers import decoded, quantization
    from sglang_mixed.engine.loading import loader, proof
    from sglang_mixed.engine.loading.transfer import PinnedTransfer

    from .stand_ins import replace_expert_kernels, replace_linear_kernels

    for module in (loader, proof, quantization):
        module.runs_on_torch_cpu = lambda: False
    replace_device(setattr)
    loader.Transfer = PinnedTransfer
    # Layers that mix would run on our own kernel, which needs a GPU or an interpreter.
    os.environ[decoded.TRITON] = "needed"
    replace_expert_kernels(setattr)
    replace_linear_kernels(setattr)


class Event:
    """Copies of the host's memory are done when they begin."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


def replace_device(replace: Replace) -> None:
    """Memory of the host in place of a GPU's, and of what is page-locked; through it `layers.fill` fills layers."""
    from sglang_mixed.engine.loading import hashing, transfer

    from . import layers

    for name, value in {
        "Event": Event,
        "current_device": lambda: 0,
        "set_device": lambda number: None,
        "synchronize": lambda: None,
    }.items():
        replace(torch.cuda, name, value)
    replace(hashing, "leaves_of", leaves_on_cpu)
    replace(transfer, "prepare", lambda: None)
    for name in ("pinned", "on_device"):
        replace(transfer, name, lambda shape, dtype: torch.empty(shape, dtype=dtype, device="cpu"))
    replace(layers, "transfer", transfer.PinnedTransfer)


def leaves_on_cpu(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """In place of the Triton kernel: SHA-256 of every leaf of one tensor after the other, uint8 [leaves, 32]."""
    return torch.frombuffer(bytearray().join(map(leaves_of, tensors)), dtype=torch.uint8).view(-1, 32)


def start_sglang(arguments: Any, backend: str) -> Any:
    """What SGLang's layers ask of their process, as its scheduler prepares it; returns the model's config.

    A process may go on to further models.
    """
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel
    from sglang.srt.layers.dp_attention import initialize_dp_attention
    from sglang.srt.layers.moe import initialize_moe_config

    from sglang_mixed.engine.python_api import call_as_known, publish_as_only_rank

    from .launch import free_port

    publish_as_only_rank(arguments)
    call_as_known(initialize_moe_config, arguments)
    if not torch.distributed.is_initialized():
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{free_port()}", 0, backend)
        initialize_model_parallel()
    config = ModelConfig.from_server_args(arguments)
    call_as_known(initialize_dp_attention, arguments, config)
    return config


def experts_error(model: Any, path: str) -> float:
    """Normalized squared error of layer 0's experts, through SGLang's own layer, against the exact references."""
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    from sglang_mixed import make_plan

    plan, prefix = make_plan(path), "model.layers.0.mlp.experts"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 256, generator=generator).to(torch.bfloat16)
    ids = torch.tensor([[0, 7], [4, 1], [2, 6], [7, 5], [3, 4], [5, 0]], dtype=torch.int32)
    weights = torch.rand(6, 2, generator=generator)
    layer = model.model.layers[0].mlp.experts
    with torch.inference_mode():
        found = layer(x, StandardTopKOutput(weights, ids, torch.zeros(6, 8))).double()
    expected = torch.zeros_like(found)
    for token, slot in ((token, slot) for token in range(6) for slot in range(2)):
        gate, up, down = (
            plan.checkpoints[plan.modules[name].source].dequantize(name).double()
            for name in (f"{prefix}.{ids[token, slot]}.{part}_proj" for part in ("gate", "up", "down"))
        )
        hidden = torch.nn.functional.silu(gate @ x[token].double()) * (up @ x[token].double())
        expected[token] += weights[token, slot].double() * (down @ hidden)
    return float((found - expected).square().sum() / expected.square().sum())
