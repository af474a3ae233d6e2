"""Write checkpoints of real size as headers alone: names, shapes and configs are true, and the files take no disk.

    python examples/headers.py qwen3-235b-a22b /tmp/hub
    HF_HUB_CACHE=/tmp/hub sglang-mixed size examples/qwen3-235b-a22b/map.yaml --tp 4 --ep 4

The folder is laid out as a Hugging Face cache, so that the example's map finds its sources by their hub names.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3-235b-a22b": {
        "config": {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "num_hidden_layers": 94,
            "num_attention_heads": 64,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "vocab_size": 151936,
            "max_position_embeddings": 40960,
            "rope_theta": 1000000.0,
            "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        },
        "sources": {
            "Qwen/Qwen3-235B-A22B": None,
            "Qwen/Qwen3-235B-A22B-FP8": FP8,
            "Qwen/Qwen3-235B-A22B-GPTQ-Int4": GPTQ,
        },
    },
    "llama2-70b": {
        "config": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "vocab_size": 32000,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
        },
        "sources": {"meta-llama/Llama-2-70b-hf": None, "TheBloke/Llama-2-70B-GPTQ": GPTQ},
    },
}
SHARD_BYTES = 4_000_000_000
ITEM_BYTES = {"BF16": 2, "F16": 2, "I32": 4, "F8_E4M3": 1}
Tensor = tuple[str, str, list[int]]


def matrices(config: dict[str, Any]) -> dict[str, list[int]]:
    """Below a layer: name -> [out, in] of what quantizers pack."""
    hidden, head = config["hidden_size"], config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    query, key = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    found = {"self_attn.q_proj": [query, hidden], "self_attn.o_proj": [hidden, query]}
    found |= {f"self_attn.{name}": [key, hidden] for name in ("k_proj", "v_proj")}
    experts = config.get("num_experts", 0)
    width = config["moe_intermediate_size"] if experts else config["intermediate_size"]
    for owner in [f"mlp.experts.{number}" for number in range(experts)] or ["mlp"]:
        found |= {f"{owner}.{name}": [width, hidden] for name in ("gate_proj", "up_proj")}
        found[f"{owner}.down_proj"] = [hidden, width]
    return found


def tensors(config: dict[str, Any], quantization: dict[str, Any] | None) -> Iterator[Tensor]:
    """(name, dtype, shape) of a whole checkpoint."""
    plain = "BF16" if config["torch_dtype"] == "bfloat16" else "F16"
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    for name, shape in (("model.embed_tokens", [vocabulary, hidden]), ("lm_head", [vocabulary, hidden])):
        yield f"{name}.weight", plain, shape
    yield "model.norm.weight", plain, [hidden]
    for layer in (f"model.layers.{number}" for number in range(config["num_hidden_layers"])):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer}.{norm}.weight", plain, [hidden]
        if config["model_type"] == "qwen3_moe":
            yield f"{layer}.mlp.gate.weight", plain, [config["num_experts"], hidden]
            for norm in ("q_norm", "k_norm"):
                yield f"{layer}.self_attn.{norm}.weight", plain, [config["head_dim"]]
        for name, shape in matrices(config).items():
            yield from stored(f"{layer}.{name}", shape, quantization, plain)


def stored(name: str, shape: list[int], quantization: dict[str, Any] | None, plain: str) -> Iterator[Tensor]:
    """One matrix as that kind of checkpoint holds it."""
    rows, columns = shape
    if quantization is None:
        yield f"{name}.weight", plain, shape
    elif quantization["quant_method"] == "fp8":
        yield f"{name}.weight", "F8_E4M3", shape
        yield f"{name}.weight_scale_inv", "BF16", [math.ceil(rows / 128), math.ceil(columns / 128)]
    else:
        yield f"{name}.qweight", "I32", [columns // 8, rows]
        yield f"{name}.qzeros", "I32", [columns // 128, rows // 8]
        yield f"{name}.scales", "F16", [columns // 128, rows]
        yield f"{name}.g_idx", "I32", [columns]


def write_checkpoint(folder: Path, config: dict[str, Any], quantization: dict[str, Any] | None) -> None:
    """A folder of sparse shards with an index."""
    folder.mkdir(parents=True)
    extra = {"quantization_config": quantization} if quantization else {}
    (folder / "config.json").write_text(json.dumps({**config, **extra}, indent=2))
    shards: list[tuple[dict[str, Any], int]] = [({}, 0)]
    for name, dtype, shape in tensors(config, quantization):
        nbytes = math.prod(shape) * ITEM_BYTES[dtype]
        if shards[-1][1] + nbytes > SHARD_BYTES:
            shards.append(({}, 0))
        header, begin = shards[-1]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + nbytes]}
        shards[-1] = header, begin + nbytes
    weight_map = {}
    for number, (header, nbytes) in enumerate(shards, 1):
        file = folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        file.write_bytes(len(raw).to_bytes(8, "little") + raw)
        os.truncate(file, 8 + len(raw) + nbytes)
        weight_map.update(dict.fromkeys(header, file.name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_model(name: str, cache: Path) -> None:
    """Every source of an example, in a Hugging Face cache."""
    for source, quantization in MODELS[name]["sources"].items():
        repository = cache / f"models--{source.replace('/', '--')}"
        write_checkpoint(repository / "snapshots" / "headers", MODELS[name]["config"], quantization)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("headers")


if __name__ == "__main__":
    write_model(sys.argv[1], Path(sys.argv[2]))
