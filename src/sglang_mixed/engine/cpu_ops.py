"""Plain-torch stand-ins on the CPU platform for operations that SGLang's models call as GPU kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import linear


def gate_shared_expert(
    original: Callable[..., None],
    hidden_states: torch.Tensor,
    gate_weight: torch.Tensor,
    shared_output: torch.Tensor,
    final_hidden_states: torch.Tensor,
) -> None:
    """Instead of `fused_gate_sigmoid_mul_add`: add the shared expert's output, times its gate, in place."""
    gate = torch.sigmoid(linear(hidden_states.float(), gate_weight.float().unsqueeze(0)))
    final_hidden_states.copy_(final_hidden_states.float() + gate * shared_output.float())


def select_experts(
    original: Callable[..., Any], hidden_states: torch.Tensor, router_logits: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Hook around `select_experts`: scores in float32, as the GPU kernels compute them, whatever the router's dtype."""
    return original(hidden_states, router_logits.float(), *args, **kwargs)


def rotary_embedding(original: Callable[..., Any], *args: Any, rope_scaling: Any = None, **kwargs: Any) -> Any:
    """Hook around `get_rope_wrapper`: on a CPU it knows scaled embeddings only; for others it is asked as on a GPU."""
    if rope_scaling is None:
        kwargs.pop("device", None)
    return original(*args, rope_scaling=rope_scaling, **kwargs)


def create_attention(runner: Any) -> Any:
    """What SGLang's table of attention backends holds under `torch_native` on the CPU platform."""
    from .cpu_attention import CPUAttention

    if runner.use_mla_backend:
        from sglang.srt.models.deepseek_common import attention_backend_handler as handlers

        # The plain backend reads keys and values from the cache, and that holds nothing but the latent ones.
        handlers.AttentionBackendRegistry.register("torch_native", handlers._dispatch_mla_subtype)
    return CPUAttention(runner)


def hooks() -> dict[str, Callable[..., Any]]:
    """SGLang's function -> what goes around it."""
    return {
        "sglang.kernels.ops.elementwise.elementwise.fused_gate_sigmoid_mul_add": gate_shared_expert,
        "sglang.srt.layers.moe.topk.select_experts": select_experts,
        "sglang.srt.layers.rotary_embedding.factory.get_rope_wrapper": rotary_embedding,
    }
