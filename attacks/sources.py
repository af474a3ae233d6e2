"""Sources that are not one model, each of them sound by itself."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tests.models import write

from sglang_mixed.errors import DifferentBaseError, SmoothingError

from .base import SINGLE, Attack, Tensors, edit_json, edit_tensors

NORM = "model.layers.0.input_layernorm.weight"


def _exchange(one: str, other: str) -> Any:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(f"{one}.")]:
            twin = other + name.removeprefix(one)
            tensors[name], tensors[twin] = tensors[twin].clone(), tensors[name].clone()

    return lambda folder: edit_tensors(folder / "fp8" / SINGLE, change)


def _rewritten(**changes: Any) -> Any:
    def build(folder: Path) -> None:
        shutil.rmtree(folder / "fp8")
        write(folder / "fp8", "fp8", layers=1, experts=2, **changes)

    return build


def _double(tensor: str) -> Any:
    def change(tensors: Tensors) -> None:
        tensors[tensor] = tensors[tensor] * 2

    return lambda folder: edit_tensors(folder / "fp8" / SINGLE, change)


_ONE = "one base model"
ATTACKS: list[Attack] = [
    Attack("weights of another model of the same size", _rewritten(seed=1), DifferentBaseError, "norms, routers and embeddings", SINGLE),
    Attack("another vocabulary", lambda folder: edit_json(folder / "fp8" / "config.json", vocab_size=97), DifferentBaseError, _ONE, "config.json"),
    Attack("another architecture", lambda folder: edit_json(folder / "fp8" / "config.json", architectures=["LlamaForCausalLM"]), DifferentBaseError, _ONE, "config.json"),
    Attack("another rope_theta", lambda folder: edit_json(folder / "fp8" / "config.json", rope_theta=5e5), DifferentBaseError, _ONE, "config.json"),
    Attack("more experts a token", lambda folder: edit_json(folder / "fp8" / "config.json", num_experts_per_tok=1), DifferentBaseError, _ONE, "config.json"),
    Attack("other embeddings", _double("model.embed_tokens.weight"), DifferentBaseError, "norms, routers and embeddings", SINGLE, "model.embed_tokens.weight"),
    Attack("another router", _double("model.layers.0.mlp.gate.weight"), DifferentBaseError, "norms, routers and embeddings", SINGLE, "model.layers.0.mlp.gate.weight"),
    Attack("experts exchanged (--verify-values)", _exchange("model.layers.0.mlp.experts.0", "model.layers.0.mlp.experts.1"), DifferentBaseError, "keep their sign", SINGLE, "model.layers.0.mlp.experts.0.down_proj"),
    Attack("k and v exchanged (--verify-values)", _exchange("model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj"), DifferentBaseError, "keep their sign", SINGLE, "model.layers.0.self_attn.k_proj"),
    Attack("a norm with smoothing folded in, its readers elsewhere", _double(NORM), SmoothingError, "come from one source"),
]  # fmt: skip
