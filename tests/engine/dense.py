"""A dense model of random weights, and quantized siblings whose linears the packers wrote."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

sys.path.append(str(Path(__file__).parents[1] / "formats"))
import packers

HIDDEN, HEADS, KV_HEADS, HEAD, INTERMEDIATE, VOCABULARY, LAYERS = 128, 4, 2, 32, 256, 512, 2
LINEARS = {
    "self_attn.q_proj": (HEADS * HEAD, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
CONFIG: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD,
    "intermediate_size": INTERMEDIATE,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
}
QWEN3 = {**CONFIG, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "tie_word_embeddings": True}
LLAMA = {**CONFIG, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}

Pack = Callable[[np.random.Generator, int, int], packers.Packed]


def plain_tensors(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Norms and embeddings: the same in every sibling."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.1).to(torch.bfloat16)

    tensors = {"model.embed_tokens.weight": normal(VOCABULARY, HIDDEN), "model.norm.weight": 1 + normal(HIDDEN)}
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = normal(VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        norms = {"input_layernorm": HIDDEN, "post_attention_layernorm": HIDDEN}
        if config["model_type"] == "qwen3":
            norms |= {"self_attn.q_norm": HEAD, "self_attn.k_norm": HEAD}
        tensors |= {f"model.layers.{layer}.{norm}.weight": 1 + normal(size) for norm, size in norms.items()}
    return tensors


def write_checkpoint(folder: Path, config: dict[str, Any], pack: Pack, factor: float = 1.0) -> Path:
    """A checkpoint whose linears `pack(rng, out, in)` made, their scales times `factor`."""
    folder.mkdir(parents=True)
    tensors, quantization = plain_tensors(config), {}
    for layer in range(LAYERS):
        for index, (name, shape) in enumerate(LINEARS.items()):
            packed = pack(np.random.default_rng(100 * layer + index), *shape)
            quantization = packed.config
            for local, tensor in packed.tensors.items():
                is_scale = local in ("scales", "weight_scale", "weight_scale_inv") or not packed.config
                tensors[f"model.layers.{layer}.{name}.{local}"] = tensor * factor if is_scale else tensor
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    extra = {"quantization_config": quantization} if quantization else {}
    (folder / "config.json").write_text(json.dumps({**config, **extra}))
    return folder


def compressed(kind: str, strategy: str, dynamic: bool = True) -> dict[str, Any]:
    """A compressed-tensors config with one group."""
    weights = {"num_bits": 8, "type": kind, "strategy": strategy, "symmetric": True}
    activations = {"num_bits": 8, "type": kind, "dynamic": dynamic}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ["lm_head"]}


BLOCK = {"quant_method": "fp8", "weight_block_size": [64, 32], "activation_scheme": "dynamic"}
#: Source name -> how its linears are packed, and what brings the weights to a useful size.
SOURCES: dict[str, tuple[Pack, float]] = {
    "bf16": (lambda rng, out, columns: packers.plain(rng, (out, columns), torch.bfloat16), 0.1),
    "act_order": (lambda rng, *shape: packers.gptq(rng, *shape, group=64, sym=False, order="act"), 0.3),
    "v2_8bit": (lambda rng, *shape: packers.gptq(rng, *shape, bits=8, group=32, version=2), 0.03),
    "gptq_3bit": (lambda rng, *shape: packers.gptq(rng, *shape, bits=3, group=-1, order="none"), 1.0),
    "fp8_tensor": (
        lambda rng, *shape: packers.eight_bit(
            rng, shape, shape, (1,), compressed("float", "tensor", dynamic=False), static=True
        ),
        1e-3,
    ),
    "fp8_block": (
        lambda rng, out, columns: packers.eight_bit(
            rng, (out, columns), (64, 32), (-(-out // 64), columns // 32), BLOCK, name="weight_scale_inv"
        ),
        1e-3,
    ),
    "int8": (
        lambda rng, out, columns: packers.eight_bit(
            rng, (out, columns), (1, columns), (out, 1), compressed("int", "channel"), integer=True
        ),
        2e-3,
    ),
}
MAP = """\
mixed_precision:
{paths}
  default: bf16
  weight_mapping:
    "model.layers.0.self_attn.{{q,k,v}}_proj": act_order
    "model.layers.0.self_attn.o_proj": gptq_3bit
    "model.layers.0.mlp.{{gate,up}}_proj": v2_8bit
    "model.layers.0.mlp.down_proj": fp8_block
    "model.layers.1.self_attn.{{q,k,v}}_proj": fp8_tensor
    "model.layers.1.mlp.{{gate,up}}_proj": int8
"""


def write_model(folder: Path, config: dict[str, Any]) -> Path:
    """All sources and a map over them; returns the map."""
    for name, (pack, factor) in SOURCES.items():
        write_checkpoint(folder / name, config, pack, factor)
    path = folder / "map.yaml"
    path.write_text(MAP.format(paths="\n".join(f"  {name}_path: {name}" for name in SOURCES)))
    return path
