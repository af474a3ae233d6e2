"""What weight names mean in the models that SGLang loads. Everything the planner knows by name stands here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

#: Last name part -> the matrix that the engine makes of it and its siblings below the same parent.
_FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "w1": "w13",
    "w3": "w13",
    "q_a_proj": "fused_qkv_a_proj",
    "kv_a_proj_with_mqa": "fused_qkv_a_proj",
}
#: Last name part of an expert's matrix -> the tensor that holds all experts' of a layer.
_EXPERT = {"gate_proj": "w13", "up_proj": "w13", "w1": "w13", "w3": "w13", "down_proj": "w2", "w2": "w2"}

#: A layer's norm -> what reads its output, below the layer. `*` stands for every expert.
_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.qkv_proj")
_LATENT = ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")
_DENSE = ("mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj")
_ROUTED = ("mlp.gate", "mlp.experts.*.gate_proj", "mlp.experts.*.up_proj")
_MIXTRAL = ("block_sparse_moe.gate", "block_sparse_moe.experts.*.w1", "block_sparse_moe.experts.*.w3")
_SHARED = tuple(
    f"mlp.{name}.{part}" for name in ("shared_experts", "shared_expert") for part in ("gate_proj", "up_proj")
)
_READERS = {
    "input_layernorm": (*_ATTENTION, *_LATENT),
    "post_attention_layernorm": (*_DENSE, *_ROUTED, *_MIXTRAL, *_SHARED, "mlp.shared_expert_gate"),
    "self_attn.q_a_layernorm": ("self_attn.q_b_proj",),
    "self_attn.kv_a_layernorm": ("self_attn.kv_b_proj",),
}
#: Where a layer has this norm too, the MLP reads it instead of `post_attention_layernorm` (Gemma 2 and 3).
_SANDWICH = "pre_feedforward_layernorm"

_ROUTERS = ("mlp.gate", "block_sparse_moe.gate", "mlp.router")
_EMBEDDINGS = ("embed_tokens", "wte")
_COMPARED = ("norm", *_ROUTERS, *_EMBEDDINGS)
_CUT_OUT = frozenset(
    (
        "q_proj",
        "k_proj",
        "v_proj",
        "gate_proj",
        "up_proj",
        "w1",
        "w3",
        "q_b_proj",
        "kv_b_proj",
        "embed_tokens",
        "lm_head",
    )
)
_CUT_IN = frozenset(("o_proj", "down_proj", "w2"))
#: More layers than any model appends for multi-token prediction.
_MAX_EXTRA_LAYERS = 8

#: Config fields that make a model's weights what they are, each under every name it goes by.
BASE_FIELDS: tuple[tuple[str, ...], ...] = (
    ("model_type",),
    ("hidden_size", "n_embd"),
    ("num_hidden_layers", "n_layer"),
    ("num_attention_heads", "n_head"),
    ("num_key_value_heads",),
    ("head_dim",),
    ("intermediate_size",),
    ("moe_intermediate_size",),
    ("num_experts", "num_local_experts", "n_routed_experts"),
    ("num_experts_per_tok",),
    ("n_shared_experts",),
    ("vocab_size",),
    ("rms_norm_eps",),
    ("rope_theta",),
    ("hidden_act",),
)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else config


def base_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields by which two configs must agree; those that a config leaves out are left out here."""
    text = text_config(config)
    rope = text.get("rope_parameters")  # transformers 5 moved rope_theta there
    merged = {
        **(rope if isinstance(rope, Mapping) else {}),
        **{key: one for key, one in text.items() if one is not None},
    }
    found = {names[0]: merged.get(name) for names in BASE_FIELDS for name in names if merged.get(name) is not None}
    if config.get("architectures"):
        found["architectures"] = config["architectures"]
    return found


def num_experts(config: Mapping[str, Any]) -> int:
    """Routed experts of a layer; 0 for a dense model."""
    text = text_config(config)
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return next((int(text[name]) for name in names if text.get(name)), 0)


def never_loaded(modules: Iterable[str], config: Mapping[str, Any]) -> set[str]:
    """Modules a checkpoint may hold and the engine leaves aside: rotary tables, MTP layers, a tied head."""
    text = text_config(config)
    layers = int(text.get("num_hidden_layers") or 0)
    extra = tuple(f"model.layers.{layer}." for layer in range(layers, layers + _MAX_EXTRA_LAYERS)) if layers else ()
    # Qwen3-MoE ignores tie_word_embeddings in SGLang and needs its own head.
    tied = bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings"))) and not num_experts(config)
    return {
        name
        for name in modules
        if name.endswith("rotary_emb") or name.startswith(extra) or (tied and name == "lm_head")
    }


def fused_matrices(parent: str) -> Mapping[str, str]:
    """Last name part -> the matrix it is a part of, below a dotted prefix (an expert's, or any other)."""
    return _EXPERT if expert_of(parent) else _FUSED


def expert_of(parent: str) -> tuple[str, int] | None:
    """(`….experts`, number) if the dotted prefix is one expert's."""
    owner, _, number = parent.rpartition(".")
    return (owner, int(number)) if owner.endswith(".experts") and number.isdecimal() else None


def compared(modules: Iterable[str]) -> list[str]:
    """The modules that prove two checkpoints to be one base model: norms, routers and embeddings."""
    return [name for name in modules if name.endswith(_COMPARED)]


def is_embedding(name: str) -> bool:
    """Whether the module holds token embeddings."""
    return name.endswith(_EMBEDDINGS)


def is_vocabulary(name: str) -> bool:
    """Whether the module's rows are tokens of the vocabulary."""
    return name.endswith((*_EMBEDDINGS, "lm_head"))


def norm_readers(norm: str, modules: Mapping[str, object]) -> list[str]:
    """The modules of `modules` that read a norm's output; empty for a norm whose output no linear reads."""
    layer, suffix = _split_layer(norm)
    if layer is None:
        return ["lm_head"] if suffix.endswith("norm") and "lm_head" in modules else []
    if f"{layer}.{_SANDWICH}" in modules:
        suffix = {"post_attention_layernorm": "", _SANDWICH: "post_attention_layernorm"}.get(suffix, suffix)
    found = []
    for reader in _READERS.get(suffix, ()):
        before, star, after = reader.partition(".*.")
        if not star:
            found.extend([f"{layer}.{reader}"] if f"{layer}.{reader}" in modules else [])
            continue
        expert = 0
        while (name := f"{layer}.{before}.{expert}.{after}") in modules:
            found.append(name)
            expert += 1
    return found


def _split_layer(name: str) -> tuple[str | None, str]:
    """`model.layers.3`, and what follows it."""
    before, found, after = name.partition(".layers.")
    if not found:
        return None, name
    number, _, suffix = after.partition(".")
    return f"{before}.layers.{number}", suffix


def cut_role(name: str) -> str | None:
    """Which side of a module's weight tensor parallelism cuts: "out", "in", or None where every rank holds it whole."""
    last = name.rpartition(".")[2]
    return "out" if last in _CUT_OUT else "in" if last in _CUT_IN else None


def is_key_value(name: str) -> bool:
    """Whether the module's outputs are key-value heads, which more ranks than heads share."""
    return name.endswith((".k_proj", ".v_proj"))


def model_order(name: str) -> int:
    """Where a module stands in a model: embeddings, layers, final norm, head."""
    return 0 if is_embedding(name) else 1 if ".layers." in name else 3 if name.startswith("lm_head") else 2
