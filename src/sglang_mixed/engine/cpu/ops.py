"""Plain-torch stand-ins on the CPU platform for operations that SGLang's models call as GPU kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import linear

from ..layers.linear import CPULinearMethod


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


def build_experts(
    original: Callable[..., None], layer: Any, *args: Any, apply_router_weight_on_input: bool = False, **kwargs: Any
) -> None:
    """Hook around `FusedMoE.__init__`: that the router's weights belong to the input is seen to by `run_experts`."""
    original(layer, *args, **kwargs)
    layer.weighs_input = apply_router_weight_on_input


def run_experts(original: Callable[..., Any], layer: Any, dispatch_output: Any) -> Any:
    """Hook around `FusedMoE.run_moe_core`: no loop in plain torch weighs an expert's input, as Llama 4's one does."""
    if layer.weighs_input:
        hidden_states, weights = dispatch_output.hidden_states, dispatch_output.topk_output.topk_weights
        assert weights.shape[1] == 1, "one expert a token"
        dispatch_output = dispatch_output._replace(
            hidden_states=(hidden_states * weights).to(hidden_states.dtype),
            topk_output=dispatch_output.topk_output._replace(topk_weights=torch.ones_like(weights)),
        )
    return original(layer, dispatch_output)


def rotary_embedding(original: Callable[..., Any], *args: Any, rope_scaling: Any = None, **kwargs: Any) -> Any:
    """Hook around `get_rope_wrapper`: on a CPU it knows scaled embeddings only; for others it is asked as on a GPU."""
    if rope_scaling is None:
        kwargs.pop("device", None)
    return original(*args, rope_scaling=rope_scaling, **kwargs)


def attend_llama4(
    original: Callable[..., torch.Tensor],
    attention: Any,
    positions: torch.Tensor,
    hidden_states: torch.Tensor,
    forward_batch: Any,
) -> torch.Tensor:
    """Instead of `Llama4Attention.forward`, which relies on a rotary kernel that writes in place, and on BF16.

    Its rotary embedding takes each head's even outputs before the odd ones, so SGLang reorders the rows of q_proj and
    k_proj as it loads them; a layer of ours has them as in the file.
    """
    qkv, _ = attention.qkv_proj(hidden_states)
    q, k, v = qkv.split([attention.q_size, attention.kv_size, attention.kv_size], dim=-1)
    if isinstance(attention.qkv_proj.quant_method, CPULinearMethod):
        q, k = (one.reshape(len(one), -1, attention.head_dim // 2, 2).mT.flatten(1) for one in (q, k))
    if attention.rotary_emb is not None:
        q, k = attention.rotary_emb(positions, q.contiguous(), k.contiguous())
    if attention.qk_norm is not None:
        heads = torch.cat([q, k], dim=-1).reshape(-1, attention.head_dim)
        q, k = attention.qk_norm(heads).view(len(q), -1).split([attention.q_size, attention.kv_size], dim=-1)
    if attention.attn_temperature_tuning and not attention.use_rope:
        q = (q * attention._get_attn_scale(positions)).to(q.dtype)
    output: torch.Tensor = attention.o_proj(attention.attn(q.contiguous(), k.contiguous(), v, forward_batch))[0]
    return output


def create_attention(runner: Any) -> Any:
    """What SGLang's table of attention backends holds under `torch_native` on the CPU platform."""
    from .attention import CPUAttention

    if runner.use_mla_backend:
        from sglang.srt.models.deepseek_common import attention_backend_handler as handlers

        # The plain backend reads keys and values from the cache, and that holds nothing but the latent ones.
        handlers.AttentionBackendRegistry.register("torch_native", handlers._dispatch_mla_subtype)
    return CPUAttention(runner)


def hooks() -> dict[str | tuple[str, ...], Callable[..., Any]]:
    """SGLang's function, by the names it has had since 0.5.15 -> what goes around it."""
    rooms = "srt.layers.elementwise", "kernels.ops.layernorm.elementwise", "kernels.ops.elementwise.elementwise"
    return {
        tuple(f"sglang.{room}.fused_gate_sigmoid_mul_add" for room in rooms): gate_shared_expert,
        "sglang.srt.layers.moe.fused_moe_triton.layer.FusedMoE.__init__": build_experts,
        "sglang.srt.layers.moe.fused_moe_triton.layer.FusedMoE.run_moe_core": run_experts,
        "sglang.srt.layers.moe.topk.select_experts": select_experts,
        "sglang.srt.models.llama4.Llama4Attention.forward": attend_llama4,
        "sglang.srt.layers.rotary_embedding.factory.get_rope_wrapper": rotary_embedding,
    }
