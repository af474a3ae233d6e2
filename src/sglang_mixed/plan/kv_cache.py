"""How many tokens' keys and values fit on a GPU beside the weights, by the rules of SGLang 0.5.20.

SGLang gives weights and cache together a share of the GPU's memory (`--mem-fraction-static`), and the cache what the
weights leave of it. It measures that on the GPU; here it is computed: the CUDA context, tensors that SGLang keeps
besides the weights (padding, halves of a latent `kv_b_proj`, rotary tables, workspaces) and what other processes hold
are not counted, so that the real number is some hundred MiB's worth of tokens smaller. Not counted either: draft
models, hierarchical and quantized-in-groups caches, pages (`--page-size` rounds the number down).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UnsupportedError
from .families import text_config

#: `--kv-cache-dtype` -> bytes of a value; 0 for the model's own dtype.
KV_CACHE_DTYPES = {"auto": 0, "bfloat16": 2, "bf16": 2, "fp8_e4m3": 1, "fp8_e5m2": 1, "fp8": 1}
#: Layers with a sliding window keep this share of the tokens that the others keep (`--swa-full-tokens-ratio`).
SWA_RATIO = 0.8
#: Architectures whose layers with a sliding window SGLang gives a smaller pool; all others' keep every token.
_BY_LAYER_TYPES = frozenset(("GptOssForCausalLM", "GraniteSWAForCausalLM", "GraniteMoeSWAForCausalLM"))
_EVERY_FOURTH_FULL = frozenset(("Llama4ForConditionalGeneration",))
#: How the names of architectures begin whose windows have heads or pools of their own.
_OTHER_WINDOWS = (
    "DeepseekV4",
    "Gemma4",
    "Inkling",
    "Laguna",
    "Mellum",
    "MiMoV2",
    "MuseGlimmer",
    "Step3p",
    "UnlimitedOCR",
)
#: GPU memory in MiB below which it holds -> (tokens of a prefill chunk, decode batch, the same from tp 4 on, graphs
#: that SGLang captures of prefill).
_DEFAULTS = (
    (20 * 1024, (2048, 8, 8, 42)),
    (35 * 1024, (4096, 48, 160, 50)),
    (60 * 1024, (4096, 32, 160, 50)),
    (160 * 1024, (8192, 256, 512, 58)),
    (1 << 40, (16384, 512, 512, 74)),
)


@dataclass(frozen=True, slots=True)
class KVCache:
    """`bytes_per_token` on one rank, and how that comes about. Not whole where layers keep a share of the tokens."""

    bytes_per_token: float
    text: str


def cache_item_bytes(dtype: str, model_item_bytes: int = 2) -> int:
    """Bytes of one cached value, of a `--kv-cache-dtype` and a model's dtype. Raises UnsupportedError for any other."""
    if dtype not in KV_CACHE_DTYPES:
        raise UnsupportedError(f"--kv-cache-dtype {dtype}", rule=f"one of {', '.join(KV_CACHE_DTYPES)}")
    return KV_CACHE_DTYPES[dtype] or model_item_bytes


def kv_cache(config: Mapping[str, Any], tp: int = 1, item: int = 2) -> KVCache:
    """A token's keys and values in all layers of one of `tp` ranks, `item` bytes a value.

    Raises UnsupportedError for models whose layers do not all keep keys and values, or keep an index beside them.
    """
    text = text_config(config)
    _refuse_other_attention(config, text)
    layers = int(text["num_hidden_layers"])
    if text.get("kv_lora_rank"):
        width = int(text["kv_lora_rank"]) + int(text["qk_rope_head_dim"])
        return KVCache(layers * width * item, f"{layers} layers x {width} latent values x {item} B on every rank")
    heads = max(1, int(text.get("num_key_value_heads") or text["num_attention_heads"]) // tp)
    key = int(text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"])
    value = int(text.get("v_head_dim") or key)
    per_layer = heads * (key + value) * item
    windowed = _windowed_layers(config, text, layers)
    shown = f"{heads} heads x ({key} + {value}) x {item} B"
    if not windowed:
        return KVCache(layers * per_layer, f"{layers} layers x {shown}")
    full = layers - windowed
    return KVCache(
        (full + SWA_RATIO * windowed) * per_layer if full else windowed * per_layer,
        f"({full} layers + {SWA_RATIO} x {windowed} with a sliding window) x {shown}",
    )


def default_mem_fraction(gpu_memory: int, tp: int, latent: bool = False) -> float:
    """SGLang's `--mem-fraction-static` where none is given; `gpu_memory` in bytes, `latent` for MLA models; at least 0.

    It keeps 1.5 MiB a token of a prefill chunk, 2 MiB a request of a decode batch, the captured graphs and a slack.
    """
    total = gpu_memory / 2**20
    chunk, batch, large_batch, graphs = next(defaults for bound, defaults in _DEFAULTS if total < bound)
    reserved = 512 + 1.5 * chunk + tp * 128 + 2 * (large_batch if tp >= 4 else batch)
    reserved += 1536 if latent else 8 * graphs
    if total > 60 * 1024:
        reserved = max(reserved, 10 * 1024)
    return max(0.0, round((total - reserved) / total, 3))


def _refuse_other_attention(config: Mapping[str, Any], text: Mapping[str, Any]) -> None:
    marks = [
        key for key in ("index_head_dim", "linear_num_value_heads", "mamba_d_state", "is_hybrid_swa") if text.get(key)
    ]
    marks += sorted(set(text.get("layer_types") or ()) - {"full_attention", "sliding_attention", "chunked_attention"})
    marks += [name for name in config.get("architectures") or () if name.startswith(_OTHER_WINDOWS)]
    if marks:
        raise UnsupportedError(
            f"the cache of this kind of attention is not computed ({', '.join(marks)})",
            rule="computed are grouped heads, latent vectors, and sliding windows as in GPT-OSS and Llama 4",
            remedy="read max_total_num_tokens in the log of a server",
        )


def _windowed_layers(config: Mapping[str, Any], text: Mapping[str, Any], layers: int) -> int:
    """Layers in the smaller pool."""
    architectures = set(config.get("architectures") or ())
    if architectures & _EVERY_FOURTH_FULL:
        return layers - layers // 4
    if architectures & _BY_LAYER_TYPES:
        return list(text.get("layer_types") or ())[:layers].count("sliding_attention")
    return 0
