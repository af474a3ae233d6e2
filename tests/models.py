"""Small checkpoints in every layout the planner must tell apart, written with the safetensors library."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HIDDEN, INTERMEDIATE, HEADS, KEY_HEADS, HEAD, VOCABULARY = 64, 128, 4, 2, 16, 96
Tensors = dict[str, torch.Tensor]

QUANTIZATION: dict[str, dict[str, Any]] = {
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True},
    "gptq64": {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": True},
}


def config(layers: int = 2, experts: int = 4, **changes: Any) -> dict[str, Any]:
    routed = {"num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": INTERMEDIATE}
    return {
        "architectures": ["Qwen3MoeForCausalLM" if experts else "Qwen3ForCausalLM"],
        "model_type": "qwen3_moe" if experts else "qwen3",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "head_dim": HEAD,
        "vocab_size": VOCABULARY,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        **(routed if experts else {}),
        **changes,
    }


def linear(kind: str, name: str, weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    rows, columns = weight.shape
    if kind == "fp8":
        yield f"{name}.weight", weight.to(torch.float8_e4m3fn)
        yield f"{name}.weight_scale_inv", torch.ones(-(-rows // 32), -(-columns // 32))
    elif kind.startswith("gptq"):
        groups = columns // QUANTIZATION[kind]["group_size"]
        yield f"{name}.qweight", torch.zeros(columns // 8, rows, dtype=torch.int32)
        yield f"{name}.qzeros", torch.full((groups, rows // 8), 0x77777777, dtype=torch.int32)
        yield f"{name}.scales", torch.ones(groups, rows, dtype=torch.float16)
        yield f"{name}.g_idx", torch.arange(columns, dtype=torch.int32) // QUANTIZATION[kind]["group_size"]
    else:
        yield f"{name}.weight", weight.to(torch.float16 if kind == "fp16" else torch.bfloat16)


def tensors(kind: str = "bf16", layers: int = 2, experts: int = 4, seed: int = 0) -> Tensors:
    """The tensors of one model; equal seeds give equal norms, routers and embeddings whatever the kind."""
    generator = torch.Generator().manual_seed(seed)
    plain = torch.float16 if kind == "fp16" else torch.bfloat16

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(torch.bfloat16)

    found: Tensors = {"model.embed_tokens.weight": random(VOCABULARY, HIDDEN).to(plain)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for name, size in (("input_layernorm", HIDDEN), ("post_attention_layernorm", HIDDEN)):
            found[f"{prefix}.{name}.weight"] = random(size).to(plain)
        for name in ("q_norm", "k_norm"):
            found[f"{prefix}.self_attn.{name}.weight"] = random(HEAD).to(plain)
        projections = {"q_proj": HEADS * HEAD, "k_proj": KEY_HEADS * HEAD, "v_proj": KEY_HEADS * HEAD}
        for name, rows in projections.items():
            found.update(linear(kind, f"{prefix}.self_attn.{name}", random(rows, HIDDEN)))
        found.update(linear(kind, f"{prefix}.self_attn.o_proj", random(HIDDEN, HEADS * HEAD)))
        if experts:
            found[f"{prefix}.mlp.gate.weight"] = random(experts, HIDDEN).to(plain)
        for owner in [f"{prefix}.mlp.experts.{expert}" for expert in range(experts)] or [f"{prefix}.mlp"]:
            found.update(linear(kind, f"{owner}.gate_proj", random(INTERMEDIATE, HIDDEN)))
            found.update(linear(kind, f"{owner}.up_proj", random(INTERMEDIATE, HIDDEN)))
            found.update(linear(kind, f"{owner}.down_proj", random(HIDDEN, INTERMEDIATE)))
    found["model.norm.weight"] = random(HIDDEN).to(plain)
    found["lm_head.weight"] = random(VOCABULARY, HIDDEN).to(plain)
    return found


def write(
    folder: Path,
    kind: str = "bf16",
    *,
    layers: int = 2,
    experts: int = 4,
    seed: int = 0,
    shards: int = 1,
    change: Callable[[Tensors], object] | None = None,
    **changes: Any,
) -> Path:
    """A checkpoint folder. `change` edits the tensors in place, `changes` the config; shards > 1 come with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    described = config(layers, experts, **changes)
    if kind in QUANTIZATION:
        described.setdefault("quantization_config", QUANTIZATION[kind])
    (folder / "config.json").write_text(json.dumps(described))
    found = tensors(kind, layers, experts, seed)
    if change:
        change(found)
    save(folder, found, shards)
    return folder


def save(folder: Path, found: Tensors, shards: int = 1) -> None:
    found = {name: tensor.contiguous().clone() for name, tensor in found.items()}
    if shards == 1:
        save_file(found, folder / "model.safetensors")
        return
    names, weight_map = sorted(found), {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        mine = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        save_file({name: found[name] for name in mine}, folder / file)
        weight_map.update(dict.fromkeys(mine, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_map(folder: Path, mapping: dict[str, str], *, default: str | None = None, **sources: str | Path) -> Path:
    """A map whose sources are given as name=folder."""
    lines = ["mixed_precision:"]
    lines += [f"  {name}_path: {path}" for name, path in sources.items()]
    lines += [f"  default: {default}"] if default else []
    lines += ["  weight_mapping:" + ("" if mapping else " {}")]
    lines += [f'    "{pattern}": {source}' for pattern, source in mapping.items()]
    file = folder / "map.yaml"
    file.write_text("\n".join(lines) + "\n")
    return file
