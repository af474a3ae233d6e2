"""A Qwen3-MoE of random weights as BF16, FP8 128x128 and GPTQ-Int4 checkpoints, large enough to time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 1024,
    "moe_intermediate_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 24,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "vocab_size": 8192,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
}
#: Qwen3-30B-A3B's widths, and all of its sizes but the layers' number and the vocabulary.
REAL_WIDTHS = {"hidden_size": 2048, "moe_intermediate_size": 768, "num_attention_heads": 32}
REAL_SIZES = {**REAL_WIDTHS, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8}
QUANTIZATION: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
}
Tensors = dict[str, torch.Tensor]


def linear(kind: str, rows: int, columns: int, generator: torch.Generator) -> Tensors:
    """One random linear's tensors as that kind of checkpoint stores them, on the generator's device.

    GPTQ's scales are of the model's dtype, as SGLang's own Marlin experts want them.
    """
    device: Any = {"generator": generator, "device": generator.device}
    if kind == "bf16":
        return {"weight": (torch.randn(rows, columns, **device) * 0.03).bfloat16()}
    if kind == "fp8":
        codes = torch.randint(0, 127, (rows, columns), dtype=torch.uint8, **device)
        signs = torch.randint(0, 2, (rows, columns), dtype=torch.uint8, **device) << 7
        scale = torch.full((rows // 128, columns // 128), 1e-3)
        return {"weight": (codes | signs).view(torch.float8_e4m3fn), "weight_scale_inv": scale}
    groups = columns // 128
    words = torch.randint(-(2**31), 2**31 - 1, (columns // 8, rows), dtype=torch.int32, **device)
    return {
        "qweight": words,
        "qzeros": torch.full((groups, rows // 8), 0x77777777, dtype=torch.int32),
        "scales": torch.full((groups, rows), 0.01, dtype=torch.bfloat16),
        "g_idx": torch.arange(columns, dtype=torch.int32) // 128,
    }


def write(folder: Path, kind: str, layers: int, device: str = "cpu", *, sharded: bool = False, **changes: int) -> Path:
    """One checkpoint of `layers` layers, drawn on `device`, in one file or in one a layer; `changes` to CONFIG."""
    config = {**CONFIG, **changes, "num_hidden_layers": layers}
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    folder.mkdir(parents=True)
    generator = torch.Generator(device).manual_seed(0)
    tensors: Tensors = {
        "model.embed_tokens.weight": linear("bf16", vocabulary, hidden, generator)["weight"] * 3,
        **{f"lm_head.{local}": one for local, one in linear("bf16", vocabulary, hidden, generator).items()},
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
    }
    weight_map: dict[str, str] = {}
    for layer in range(layers):
        found = _layer(kind, layer, config, generator)
        if sharded:
            weight_map |= _save(folder, f"model-{layer}.safetensors", found)
        else:
            tensors |= found
    weight_map |= _save(folder, "model-rest.safetensors" if sharded else "model.safetensors", tensors)
    if sharded:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    quantization = {"quantization_config": QUANTIZATION[kind]} if QUANTIZATION[kind] else {}
    (folder / "config.json").write_text(json.dumps({**config, **quantization}))
    return folder


def _layer(kind: str, layer: int, config: dict[str, Any], generator: torch.Generator) -> Tensors:
    prefix, hidden, tensors = f"model.layers.{layer}", config["hidden_size"], Tensors()
    for name, shape in linears(config).items():
        found = linear(kind, *shape, generator)
        tensors |= {f"{prefix}.{name}.{local}": tensor for local, tensor in found.items()}
    router = torch.randn(config["num_experts"], hidden, generator=torch.Generator().manual_seed(layer))
    tensors[f"{prefix}.mlp.gate.weight"] = (router * 0.03).bfloat16()
    for norm, size in (("input_layernorm", hidden), ("post_attention_layernorm", hidden)):
        tensors[f"{prefix}.{norm}.weight"] = torch.ones(size, dtype=torch.bfloat16)
    for norm in ("q_norm", "k_norm"):
        tensors[f"{prefix}.self_attn.{norm}.weight"] = torch.ones(config["head_dim"], dtype=torch.bfloat16)
    return tensors


def _save(folder: Path, file: str, tensors: Tensors) -> dict[str, str]:
    save_file(tensors, folder / file)
    return dict.fromkeys(tensors, file)


def linears(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Name -> [out, in] of one layer's linears."""
    hidden, width = config["hidden_size"], config["moe_intermediate_size"]
    query, key = (config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    shapes = {"q_proj": (query, hidden), "k_proj": (key, hidden), "v_proj": (key, hidden), "o_proj": (hidden, query)}
    found = {f"self_attn.{name}": shape for name, shape in shapes.items()}
    for expert in range(config["num_experts"]):
        found |= {f"mlp.experts.{expert}.{name}": (width, hidden) for name in ("gate_proj", "up_proj")}
        found[f"mlp.experts.{expert}.down_proj"] = (hidden, width)
    return found


def write_map(path: Path, rules: dict[str, str], **sources: Path) -> Path:
    """A map over these sources; the first is the default."""
    lines = [f"  {name}_path: {folder}" for name, folder in sources.items()]
    mapping = [f'    "{pattern}": {source}' for pattern, source in rules.items()]
    path.write_text("\n".join(["mixed_precision:", *lines, *(["  weight_mapping:", *mapping] if mapping else []), ""]))
    return path
