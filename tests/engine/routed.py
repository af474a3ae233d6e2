"""Which experts a token stream is routed to, by hooks on transformers' own model: what the engine's counts must be."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from sglang_mixed.plan import Plan

from .family_models import fuse_experts
from .reference import write_reference

#: Prompt and output of each request.
Streams = Sequence[tuple[list[int], list[int]]]


class Routed(NamedTuple):
    """[layers, experts] each: tokens of the prompts, tokens decoded after them, sums of both's router weights."""

    prefill: np.ndarray
    decode: np.ndarray
    weights: np.ndarray


def route(plan: Plan, folder: Path, streams: Streams, experts: int) -> Routed:
    """Run the streams through the plan's model in float32. A request's last output is a token that no layer sees."""
    from transformers import AutoModelForCausalLM

    written = write_language_model(plan, folder)
    model = AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32, attn_implementation="eager").eval()
    ids: dict[str, torch.Tensor] = {}
    weights: dict[str, torch.Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
            if name.endswith("router"):  # Llama 4's one expert is told by the scores: all others have 0
                weights[name], ids[name] = output[0].topk(1)
            else:
                _, ids[name], weights[name] = inputs

        return hook

    routers = ".feed_forward.router" if model.config.model_type.startswith("llama4") else ".experts"
    for name, module in model.named_modules():
        if name.endswith(routers):
            module.register_forward_hook(note(name))
    found = []
    for prompt, output in streams:
        with torch.inference_mode():
            model(input_ids=torch.tensor([prompt + output[:-1]]))
        layers = [_count(ids[name], weights[name], len(prompt), experts) for name in ids]
        found.append([np.stack(arrays) for arrays in zip(*layers, strict=True)])
    return Routed(*(np.sum(arrays, axis=0) for arrays in zip(*found, strict=True)))


def write_language_model(plan: Plan, folder: Path) -> Path:
    """The plan's model in float32; of a larger one, the language model alone."""
    write_reference(plan, folder, torch.float32)
    config = json.loads((folder / "config.json").read_text())
    if "text_config" in config:
        text = config["text_config"] | {"architectures": ["Llama4ForCausalLM"], "tie_word_embeddings": False}
        (folder / "config.json").write_text(json.dumps(text))
        tensors = load_file(folder / "model.safetensors")
        own = {name.removeprefix("language_model."): tensor for name, tensor in tensors.items()}
        save_file(
            {name: tensor.contiguous() for name, tensor in fuse_experts(own, text["model_type"]).items()},
            folder / "model.safetensors",
        )
    return folder


def _count(ids: torch.Tensor, weights: torch.Tensor, prompt: int, experts: int) -> list[np.ndarray]:
    chosen = torch.nn.functional.one_hot(ids, experts)  # [tokens, top-k, experts]
    sums = torch.einsum("tk,tke->e", weights.double(), chosen.double())
    tokens = chosen.sum(dim=1)
    return [one.numpy() for one in (tokens[:prompt].sum(dim=0), tokens[prompt:].sum(dim=0), sums)]
