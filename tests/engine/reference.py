"""The reference of a mix: the same weights, dequantized to BF16 by the formats' exact references, as one checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from sglang_mixed.formats import get_format
from sglang_mixed.plan import Plan, make_plan

from .comparison import REQUEST, differing_tokens, held_out_prompts, largest_difference, random_prompts
from .family_models import fuse_experts
from .launch import TINY, Engine

# Prompts are token ids.
_COMMON: dict[str, Any] = {"skip_tokenizer_init": True}


def write_reference(plan: Plan, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write the plan's model in one dtype, for stock SGLang in BF16; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    for module in plan.modules.values():
        stored = plan.checkpoints[module.source].read(module.name)
        if module.format.name == "plain":
            tensors |= {f"{module.name}.{local}": stored[local] for local in module.tensors}
            continue
        weight = get_format(module.format.name).dequantize(stored, module.format.parameters, torch.float32)
        tensors[f"{module.name}.weight"] = weight.to(dtype)
        if "bias" in module.tensors:
            tensors[f"{module.name}.bias"] = stored["bias"]
    base = plan.sources[plan.base]
    config = json.loads((base / "config.json").read_text())
    if config["model_type"] == "gpt_oss":  # the only one that SGLang takes in no other way
        tensors = fuse_experts(tensors, "gpt_oss")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (base / name).exists():
            shutil.copy(base / name, folder / name)
    return folder


class Comparison(NamedTuple):
    """Of log-probabilities; (prompt, position) of greedy tokens; what the mixed engine reports."""

    largest_difference: float
    differing_tokens: list[tuple[int, int]]
    memory: dict[str, Any]


class References:
    """Stock SGLang on plans' dequantized models, each started once: however a mix is cut, its reference is the same."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._engines: dict[str, Engine] = {}
        self._compared = 0

    def start(self, plan: Plan, prompts: list[list[int]], common: Mapping[str, Any] = _COMMON) -> Engine:
        """The engine that answers, or has answered."""
        # A fingerprint is of headers, not of values: models of other folders are others.
        key = json.dumps([plan.fingerprint, [str(path) for path in plan.sources.values()], prompts, dict(common)])
        if key not in self._engines:
            folder = write_reference(plan, self._folder / str(len(self._engines)))
            self._engines[key] = Engine(folder / "log", folder, {"input_ids": prompts, **REQUEST}, **common)
        return self._engines[key]

    def answers(
        self, plan: Plan, prompts: list[list[int]], common: Mapping[str, Any] = _COMMON
    ) -> list[dict[str, Any]]:
        """What the reference answers to `comparison.REQUEST`."""
        answers: list[dict[str, Any]] = self.start(plan, prompts, common).result()["answers"][0]
        return answers

    def compare(
        self,
        described: Path,
        prompts: list[list[int]] | None = None,
        common: Mapping[str, Any] = _COMMON,
        **arguments: Any,
    ) -> Comparison:
        """Serve a map with these engine arguments, and its reference on one rank; both get the `common` ones."""
        plan = make_plan(described)
        model = plan.sources[plan.base]
        asked = prompts or prompts_for(model)
        self._compared += 1
        mix = {"enable_mixed_precision": True, "mixed_precision_config": str(described)}
        log = self._folder / f"mixed-{self._compared}.log"
        mixed = Engine(log, model, {"input_ids": asked, **REQUEST}, **mix, **common, **arguments)
        reference = self.start(plan, asked, common)
        result = mixed.result()
        answers = result["answers"][0], reference.result()["answers"][0]
        return Comparison(largest_difference(*answers), differing_tokens(*answers), result["memory"])


def prompts_for(model: Path) -> list[list[int]]:
    """Held-out text for the trained tiny model, random tokens for others."""
    if model.parent == TINY:
        return held_out_prompts()
    config = json.loads((model / "config.json").read_text())
    return random_prompts(config.get("text_config", config)["vocab_size"])
