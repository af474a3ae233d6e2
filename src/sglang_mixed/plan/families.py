"""What weight names mean in the models that SGLang loads. Everything the planner knows by name stands here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

#: Matrix that the engine makes of several -> their last name parts below one parent, in its order of rows.
FUSED: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
}
#: What checkpoints call an expert's gate, up and down projection.
EXPERTS: tuple[tuple[str, str, str], ...] = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))

_FUSED = {part: matrix for matrix, parts in FUSED.items() for part in parts}
_FUSED |= {"w1": "w13", "w3": "w13"}  # a dense layer of Mixtral's naming
#: Last name part of an expert's matrix -> the tensor that holds all experts' of a layer.
_EXPERT = {part: matrix for names in EXPERTS for part, matrix in zip(names, ("w13", "w13", "w2"), strict=True)}

#: A layer's MLPs, where it has them: dense or routed, and the expert that sees every token.
_MLPS = ("mlp", "block_sparse_moe", "feed_forward")
_SHARED = ("shared_expert", "shared_experts")
#: Last name parts that only a router has, below an MLP.
_ROUTER = ("gate", "router")
#: A layer's norm -> what reads its output, below the layer. `*` stands for every expert.
_ATTENTION = ("q_proj", "k_proj", "v_proj", "qkv_proj", "q_a_proj", "kv_a_proj_with_mqa")
_MLP_READERS = (
    *_ROUTER,
    "gate_proj",
    "up_proj",
    "gate_up_proj",
    "experts",
    *(f"experts.*.{part}" for part in ("gate_proj", "up_proj", "w1", "w3")),
    *(f"{shared}.{part}" for shared in _SHARED for part in ("gate_proj", "up_proj")),
    "shared_expert_gate",
)
_READERS = {
    "input_layernorm": tuple(f"self_attn.{part}" for part in _ATTENTION),
    "post_attention_layernorm": tuple(f"{mlp}.{part}" for mlp in _MLPS for part in _MLP_READERS),
    "self_attn.q_a_layernorm": ("self_attn.q_b_proj",),
    "self_attn.kv_a_layernorm": ("self_attn.kv_b_proj",),
}
#: Where a layer has this norm too, the MLP reads it instead of `post_attention_layernorm` (Gemma 2 and 3).
_SANDWICH = "pre_feedforward_layernorm"

_ROUTERS = tuple(f".{mlp}.{router}" for mlp in _MLPS for router in _ROUTER)
_EMBEDDINGS = ("embed_tokens", "wte")
_COMPARED = ("norm", *_ROUTERS, *_EMBEDDINGS)
_16_BITS = (*_COMPARED, "lm_head", ".shared_expert_gate")
#: Last name parts whose outputs, or inputs, are shared out; all else every rank holds whole: routers, norms, gates of
#: shared experts, the low-rank projections of latent attention. `self_attn` itself holds one sink a head.
_CUT_OUT = frozenset(
    (
        *("q_proj", "k_proj", "v_proj", "q_b_proj", "kv_b_proj", "self_attn"),
        *("gate_proj", "up_proj", "w1", "w3"),
        *("embed_tokens", "lm_head"),
    )
)
_CUT_IN = frozenset(("o_proj", "down_proj", "w2"))
#: Last name part -> the config field that says of how many heads its rows are made.
_HEADS = {
    **dict.fromkeys(("q_proj", "q_b_proj", "kv_b_proj", "self_attn"), "num_attention_heads"),
    **dict.fromkeys(("k_proj", "v_proj"), "num_key_value_heads"),
}
#: Architectures whose head SGLang does not tie, whatever `tie_word_embeddings` says.
_NEVER_TIED = frozenset(f"{name}ForCausalLM" for name in ("Qwen2Moe", "Qwen3Moe", "Mixtral", "Glm4Moe", "GptOss"))
#: Architecture -> how the names of what SGLang leaves aside begin: it serves these models' text only, unless told.
_TEXT_ONLY = {"Llama4ForConditionalGeneration": ("vision_model.", "multi_modal_projector.")}
#: What the names of a language model begin with, where it is part of a larger model.
LANGUAGE_MODEL = "language_model."
#: Where a model's layers are numbered.
LAYERS = ("model.layers", f"{LANGUAGE_MODEL}model.layers")
#: model_type -> the projections whose rows SGLang reorders when it loads them, in 16 bits.
_REORDERED = {"llama4_text": ("q_proj", "k_proj")}
#: Layers past the last for multi-token prediction; no model appends more.
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
    ("shared_expert_intermediate_size",),
    ("first_k_dense_replace",),
    ("q_lora_rank",),
    ("kv_lora_rank",),
    ("qk_nope_head_dim",),
    ("qk_rope_head_dim",),
    ("v_head_dim",),
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


def other_mlp(name: str) -> tuple[str, ...]:
    """Of a dense MLP's matrix: what its layer has if it has experts instead; of an expert's, the reverse.

    None of other names. Some of what is returned is in the model if its layer is of the other kind.
    """
    parts = {part for names in EXPERTS for part in names}
    parent, _, last = name.rpartition(".")
    above, _, number = parent.rpartition(".")
    if last not in parts:
        return ()
    if number.isdigit() and above.endswith(".experts"):
        return tuple(f"{above.removesuffix('.experts')}.{part}" for part in parts)
    return tuple(f"{parent}.experts.0.{part}" for part in parts) if number in _MLPS else ()


def never_loaded(modules: Iterable[str], config: Mapping[str, Any]) -> set[str]:
    """Modules a checkpoint may hold and the engine leaves aside: rotary tables, MTP layers, a tied head, vision."""
    text, architectures = text_config(config), config.get("architectures") or ()
    layers = int(text.get("num_hidden_layers") or 0)
    further = range(layers, layers + _MAX_EXTRA_LAYERS) if layers else ()
    owners = ("",) if text is config else ("", LANGUAGE_MODEL)
    aside = [f"{owner}model.layers.{layer}." for owner in owners for layer in further]
    aside += [start for name in architectures for start in _TEXT_ONLY.get(name, ())]
    tied = bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings")))
    tied = tied and _NEVER_TIED.isdisjoint(architectures)
    begins = tuple(aside)
    return {
        name
        for name in modules
        if name.endswith("rotary_emb") or name.startswith(begins) or (tied and name == "lm_head")
    }


def fused_matrices(parent: str) -> Mapping[str, str]:
    """Last name part -> the matrix it is a part of, below a dotted prefix (an expert's, or any other)."""
    return _EXPERT if expert_of(parent) else _FUSED


@lru_cache(maxsize=65_536)
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
        head = f"{norm.removesuffix('model.norm')}lm_head"
        return [head] if suffix.endswith("model.norm") and head in modules else []
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


def layer_of(name: str) -> int:
    """The number of the decoder layer that a module is in; 0 for what stands before them all."""
    layer, _ = _split_layer(name)
    number = layer.rpartition(".")[2] if layer else "0"
    return int(number) if number.isdecimal() else 0


def cut_role(name: str) -> str | None:
    """Which side of a module's weight tensor parallelism cuts: "out", "in", or None where every rank holds it whole."""
    last = name.rpartition(".")[2]
    return "out" if last in _CUT_OUT else "in" if last in _CUT_IN else None


def heads_field(name: str) -> str | None:
    """The config field that says of how many heads a module's rows are made; None for rows that are no heads'."""
    return _HEADS.get(name.rpartition(".")[2])


def is_reordered(name: str, config: Mapping[str, Any]) -> bool:
    """Whether SGLang reorders the rows of the module's weight as it loads it, which it can do in 16 bits only."""
    return name.rpartition(".")[2] in _REORDERED.get(str(text_config(config).get("model_type")), ())


def is_router(name: str) -> bool:
    """Whether the module chooses the experts of each token."""
    return name.endswith(_ROUTERS)


def runs_in_16_bits(name: str) -> bool:
    """Whether SGLang reads the module's weight without a quantization method, so that it cannot stay compressed."""
    return name.endswith(_16_BITS)


def is_key_value(name: str) -> bool:
    """Whether the module's outputs are key-value heads, which more ranks than heads share."""
    return name.endswith((".k_proj", ".v_proj"))


def model_order(name: str) -> int:
    """Where a module stands in a model: embeddings, layers, final norm, head."""
    return 0 if is_embedding(name) else 1 if ".layers." in name else 3 if name.endswith("lm_head") else 2
