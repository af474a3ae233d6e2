"""Tiny models of every family that the planner knows, as tables: config, quantized matrices, what stays in 16 bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

HIDDEN, HEADS, KV_HEADS, HEAD, LAYERS, VOCABULARY = 128, 4, 2, 32, 2, 512
WIDTH, EXPERT_WIDTH, EXPERTS = 256, 128, 8
Q_LORA, KV_LORA, NOPE, ROPE, VALUE = 64, 64, 32, 32, 64

Shape = tuple[int, ...]
Shapes = dict[str, Shape]


def gated(parent: str, width: int, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> Shapes:
    """A gated MLP's matrices."""
    gate, up, down = (f"{parent}.{name}" for name in names)
    return {gate: (width, HIDDEN), up: (width, HIDDEN), down: (HIDDEN, width)}


def experts(parent: str, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> Shapes:
    """Every expert's matrices."""
    each = (gated(f"{parent}.{expert}", EXPERT_WIDTH, names) for expert in range(EXPERTS))
    return {name: shape for one in each for name, shape in one.items()}


HEADS_ATTENTION: Shapes = {
    "self_attn.q_proj": (HEADS * HEAD, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
}
QUERY_NORMS: Shapes = {"self_attn.q_norm.weight": (HEAD,), "self_attn.k_norm.weight": (HEAD,)}
QKV_BIASES: Shapes = {f"{name}.bias": HEADS_ATTENTION[name][:1] for name in tuple(HEADS_ATTENTION)[:3]}
LATENT: Shapes = {
    "self_attn.kv_a_proj_with_mqa": (KV_LORA + ROPE, HIDDEN),
    "self_attn.kv_b_proj": (HEADS * (NOPE + VALUE), KV_LORA),
    "self_attn.o_proj": (HIDDEN, HEADS * VALUE),
}
LATENT_NORMS: Shapes = {"self_attn.kv_a_layernorm.weight": (KV_LORA,)}
DENSE = gated("mlp", WIDTH)
ROUTED = experts("mlp.experts")
ROUTER: Shapes = {"mlp.gate.weight": (EXPERTS, HIDDEN)}
CORRECTION: Shapes = {"mlp.gate.e_score_correction_bias": (EXPERTS,)}

CONFIG: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD,
    "intermediate_size": WIDTH,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 256,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
QWEN_MOE: dict[str, Any] = {
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": EXPERT_WIDTH,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": HEADS,
    "kv_lora_rank": KV_LORA,
    "qk_nope_head_dim": NOPE,
    "qk_rope_head_dim": ROPE,
    "v_head_dim": VALUE,
    "head_dim": ROPE,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "moe_intermediate_size": EXPERT_WIDTH,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "rope_scaling": YARN,
}


@dataclass(frozen=True)
class Family:
    """A family's table: `dense` is layer 0 and `layer` every other one (as `dense` where nothing is routed)."""

    architecture: str
    model_type: str
    config: Mapping[str, Any]
    layer: Shapes
    plain: Shapes
    dense: Shapes | None = None
    dense_plain: Shapes | None = None
    #: Its 16-bit checkpoints hold all experts of a layer in one tensor.
    fused: bool = False
    #: Layers past the last, which predict further tokens and which SGLang leaves aside.
    extra: Shapes = field(default_factory=dict)
    #: What the names begin with, and the config around the language model's, where it is part of a larger model.
    prefix: str = ""
    around: Mapping[str, Any] = field(default_factory=dict)

    def full_config(self) -> dict[str, Any]:
        """config.json without a quantization."""
        own = {**CONFIG, "model_type": self.model_type, **self.config}
        whole = {**self.around, "text_config": own, "torch_dtype": CONFIG["torch_dtype"]} if self.around else own
        return {**whole, "architectures": [self.architecture]}

    @property
    def is_tied(self) -> bool:
        """Whether the embeddings are the head, too."""
        return bool({**CONFIG, **self.config}["tie_word_embeddings"])

    def matrices(self, layer: int) -> Shapes:
        """Local name -> [out, in] of what quantizers pack in a layer."""
        return self.dense if self.dense is not None and layer == 0 else self.layer

    def others(self, layer: int) -> Shapes:
        """Local tensor name -> shape of what every sibling holds in 16 bits."""
        norms: Shapes = {"input_layernorm.weight": (HIDDEN,), "post_attention_layernorm.weight": (HIDDEN,)}
        is_dense = self.dense_plain is not None and layer == 0
        return {**norms, **(self.dense_plain or {} if is_dense else self.plain)}


#: What the layer for the next token but one has on the hub, its attention and experts left out.
NEXT_TOKEN: Shapes = {
    f"model.layers.{LAYERS}.{name}.weight": shape
    for name, shape in {
        "embed_tokens": (VOCABULARY, HIDDEN),
        "enorm": (HIDDEN,),
        "hnorm": (HIDDEN,),
        "eh_proj": (HIDDEN, 2 * HIDDEN),
        "shared_head.norm": (HIDDEN,),
        "mlp.experts.0.up_proj": (EXPERT_WIDTH, HIDDEN),
    }.items()
}
QUERY = {"self_attn.q_proj": (HEADS * (NOPE + ROPE), HIDDEN)}
LOW_RANK_QUERY = {
    "self_attn.q_a_proj": (Q_LORA, HIDDEN),
    "self_attn.q_b_proj": (HEADS * (NOPE + ROPE), Q_LORA),
}
LOW_RANK_NORMS = {**LATENT_NORMS, "self_attn.q_a_layernorm.weight": (Q_LORA,)}
SHARED = gated("mlp.shared_experts", 2 * EXPERT_WIDTH)

FAMILIES: dict[str, Family] = {
    "qwen3": Family(
        "Qwen3ForCausalLM", "qwen3", {"tie_word_embeddings": True}, {**HEADS_ATTENTION, **DENSE}, QUERY_NORMS
    ),
    "llama": Family("LlamaForCausalLM", "llama", {}, {**HEADS_ATTENTION, **DENSE}, {}),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        {**QWEN_MOE, "norm_topk_prob": True},
        {**HEADS_ATTENTION, **ROUTED},
        {**QUERY_NORMS, **ROUTER},
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        "qwen2_moe",
        {**QWEN_MOE, "norm_topk_prob": False, "shared_expert_intermediate_size": WIDTH, "use_sliding_window": False},
        {**HEADS_ATTENTION, **ROUTED, **gated("mlp.shared_expert", WIDTH)},
        {**QKV_BIASES, **ROUTER, "mlp.shared_expert_gate.weight": (1, HIDDEN)},
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        "mixtral",
        {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "intermediate_size": EXPERT_WIDTH},
        {**HEADS_ATTENTION, **experts("block_sparse_moe.experts", ("w1", "w3", "w2"))},
        {"block_sparse_moe.gate.weight": (EXPERTS, HIDDEN)},
    ),
    "deepseek_v2": Family(
        "DeepseekV2ForCausalLM",
        "deepseek_v2",
        {
            **DEEPSEEK,
            "rope_scaling": None,
            "q_lora_rank": None,
            "topk_method": "greedy",
            "n_group": 1,
            "topk_group": 1,
            "scoring_func": "softmax",
            "norm_topk_prob": False,
        },
        {**QUERY, **LATENT, **ROUTED, **SHARED},
        {**LATENT_NORMS, **ROUTER},
        {**QUERY, **LATENT, **DENSE},
        LATENT_NORMS,
    ),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        "deepseek_v3",
        {
            **DEEPSEEK,
            "q_lora_rank": Q_LORA,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "norm_topk_prob": True,
            "num_nextn_predict_layers": 1,
        },
        {**LOW_RANK_QUERY, **LATENT, **ROUTED, **SHARED},
        {**LOW_RANK_NORMS, **ROUTER, **CORRECTION},
        {**LOW_RANK_QUERY, **LATENT, **DENSE},
        LOW_RANK_NORMS,
        extra=NEXT_TOKEN,
    ),
    "glm4_moe": Family(
        "Glm4MoeForCausalLM",
        "glm4_moe",
        {
            "attention_bias": True,
            "use_qk_norm": True,
            "partial_rotary_factor": 0.5,
            "n_routed_experts": EXPERTS,
            "num_experts_per_tok": 3,
            "n_shared_experts": 1,
            "moe_intermediate_size": EXPERT_WIDTH,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "num_nextn_predict_layers": 1,
        },
        {**HEADS_ATTENTION, **ROUTED, **gated("mlp.shared_experts", EXPERT_WIDTH)},
        {**QKV_BIASES, **QUERY_NORMS, **ROUTER, **CORRECTION},
        {**HEADS_ATTENTION, **DENSE},
        {**QKV_BIASES, **QUERY_NORMS},
        extra=NEXT_TOKEN,
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        "gpt_oss",
        {
            "attention_bias": True,
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "intermediate_size": EXPERT_WIDTH,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 8,
            "swiglu_limit": 7.0,
            "hidden_act_alpha": 1.702,
            "rope_scaling": {**YARN, "truncate": False},
        },
        {**HEADS_ATTENTION, **ROUTED},
        {
            **QKV_BIASES,
            "self_attn.o_proj.bias": (HIDDEN,),
            "self_attn.sinks": (HEADS,),
            "mlp.router.weight": (EXPERTS, HIDDEN),
            "mlp.router.bias": (EXPERTS,),
            **{f"{name}.bias": shape[:1] for name, shape in ROUTED.items()},
        },
        fused=True,
    ),
    "llama4": Family(
        "Llama4ForConditionalGeneration",
        "llama4_text",
        {
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "moe_layers": [1],
            "intermediate_size": EXPERT_WIDTH,
            "intermediate_size_mlp": WIDTH,
            "use_qk_norm": True,
            "no_rope_layers": [1, 1],
            "rope_scaling": None,
        },
        {**HEADS_ATTENTION, **experts("feed_forward.experts"), **gated("feed_forward.shared_expert", EXPERT_WIDTH)},
        {"feed_forward.router.weight": (EXPERTS, HIDDEN)},
        {**HEADS_ATTENTION, **gated("feed_forward", WIDTH)},
        {},
        fused=True,
        prefix="language_model.",
        around={
            "model_type": "llama4",
            "tie_word_embeddings": False,
            "image_token_index": VOCABULARY - 1,
            "vision_config": {"model_type": "llama4_vision_model"},
        },
    ),
}
