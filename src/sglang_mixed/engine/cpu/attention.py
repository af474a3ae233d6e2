"""Attention on the CPU platform: SGLang's plain-torch backend, and what it lacks for latent attention and sinks."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc, MLATokenToKVPool


class LatentKVPool(MLATokenToKVPool):
    """SGLang's pool for multi-head latent attention, as it builds one for a platform that is not its own."""

    def __init__(self, *args: Any, index_head_dim: int | None = None, **kwargs: Any) -> None:
        assert index_head_dim is None, "sparse attention has a pool of its own"
        super().__init__(*args, **kwargs)


class CPUAttention(TorchNativeAttnBackend):
    """Plain torch attention; a layer's sinks (one learned logit a head that takes weight from the keys) included."""

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """q [tokens, heads x size] of prompts, after what the cache holds of them -> [tokens, heads x value size]."""
        if sinks is None:
            output: torch.Tensor = super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)
            return output
        lengths = forward_batch.extend_seq_lens.tolist()
        return self._with_sinks(q, k, v, layer, forward_batch, save_kv_cache, sinks, lengths)

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """q [sequences, heads x size], one token each -> [sequences, heads x value size]."""
        if sinks is None:
            output: torch.Tensor = super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
            return output
        return self._with_sinks(q, k, v, layer, forward_batch, save_kv_cache, sinks, [1] * len(q))

    def _with_sinks(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool,
        sinks: torch.Tensor,
        lengths: list[int],
    ) -> torch.Tensor:
        if save_kv_cache:
            self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
        keys = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
        values = self.token_to_kv_pool.get_value_buffer(layer.layer_id)
        queries = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        output = q.new_empty(len(queries), layer.tp_q_head_num * layer.v_head_dim)
        begin = 0
        places = zip(forward_batch.req_pool_indices.tolist(), forward_batch.seq_lens.tolist(), lengths, strict=True)
        for request, total, new in places:
            rows = self.req_to_token_pool.req_to_token[request, :total]
            output[begin : begin + new] = attend_with_sinks(
                queries[begin : begin + new],
                keys[rows].to(q.dtype),
                values[rows].to(q.dtype),
                sinks,
                layer.scaling,
                layer.sliding_window_size,
            ).flatten(1)
            begin += new
        return output


def attend_with_sinks(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    sinks: torch.Tensor,
    scaling: float,
    window: int | None = None,
) -> torch.Tensor:
    """Causal attention of the last tokens of a sequence over all of it: [new, heads, size] -> [new, heads, value size].

    keys and values [total, key heads, size]; sinks [heads]; `window` is how many tokens before its own one sees.
    """
    new, total = len(queries), len(keys)
    own = torch.arange(total - new, total).unsqueeze(1)
    seen = torch.arange(total).unsqueeze(0)
    visible = seen <= own
    if window is not None and window >= 0:
        visible &= seen >= own - window
    # The sink is one more key: its score is the mask's entry (the key itself is zero), its value nothing.
    bias = queries.new_full((len(sinks), new, total + 1), float("-inf"))
    bias[:, :, :total].masked_fill_(visible, 0.0)
    bias[:, :, total] = sinks.to(queries.dtype).unsqueeze(1)
    key, value = (torch.cat([one, one.new_zeros(1, *one.shape[1:])]).transpose(0, 1) for one in (keys, values))
    output = torch.nn.functional.scaled_dot_product_attention(
        queries.transpose(0, 1), key, value, attn_mask=bias, scale=scaling, enable_gqa=True
    )
    return output.transpose(0, 1)
