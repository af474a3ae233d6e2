"""Mixes in which neighbours differ: every expert, every part of a fused matrix, every gate, up and down."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .families import FAMILIES, HIDDEN, Family, Shapes, gated
from .family_models import write_family

sys.path.append(str(Path(__file__).parents[1] / "formats"))
import packers

Pack = Callable[[np.random.Generator, int, int], packers.Packed]
BLOCK = {"quant_method": "fp8", "weight_block_size": [64, 32], "activation_scheme": "dynamic"}


def compressed(kind: str, strategy: str, dynamic: bool = True) -> dict[str, Any]:
    """A compressed-tensors config with one group."""
    weights = {"num_bits": 8, "type": kind, "strategy": strategy, "symmetric": True}
    activations = {"num_bits": 8, "type": kind, "dynamic": dynamic}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ["lm_head"]}


#: Source name -> how its linears are packed, and what brings the weights to a useful size.
SOURCES: dict[str, tuple[Pack, float]] = {
    "bf16": (lambda rng, out, columns: packers.plain(rng, (out, columns), torch.bfloat16), 0.1),
    "gptq": (lambda rng, *shape: packers.gptq(rng, *shape), 0.3),
    "act_order": (lambda rng, *shape: packers.gptq(rng, *shape, group=64, sym=False, order="act"), 0.3),
    "v2_8bit": (lambda rng, *shape: packers.gptq(rng, *shape, bits=8, group=32, version=2), 0.03),
    "gptq_3bit": (lambda rng, *shape: packers.gptq(rng, *shape, bits=3, group=-1, order="none"), 1.0),
    "awq": (lambda rng, *shape: packers.awq(rng, *shape, group=64), 0.3),
    "packed": (lambda rng, *shape: packers.packed(rng, *shape, sym=False), 0.3),
    "fp8_tensor": (
        lambda rng, *shape: packers.eight_bit(
            rng, shape, shape, (1,), compressed("float", "tensor", dynamic=False), static=True
        ),
        1e-3,
    ),
    "fp8_block": (
        lambda rng, out, columns: packers.eight_bit(
            rng, (out, columns), (64, 32), (-(-out // 64), -(-columns // 32)), BLOCK, name="weight_scale_inv"
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


def everything_differs(matrices: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(module, source): the sources in turn, so that no two neighbours agree."""
    sources, turn = list(SOURCES), count()
    for name in matrices:
        yield name, sources[next(turn) % len(sources)]


def three_formats(matrices: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The first half of the experts FP8, the others GPTQ, the last one alone in INT8; attention FP8, the rest BF16."""
    for name in matrices:
        owner, found, rest = name.partition("experts.")
        if found and owner.endswith("."):
            expert = int(rest.partition(".")[0])
            yield name, "fp8_block" if expert < 4 else "gptq" if expert < 7 else "int8"
        elif "self_attn" in name:
            yield name, "fp8_block"


Mix = Callable[[Iterable[str]], Iterator[tuple[str, str]]]
MIXES: dict[str, Mix] = {"everything differs": everything_differs, "three formats": three_formats}


def with_experts(family: Family, number: int, width: int, top_k: int) -> Family:
    """The family with as many experts of this width."""
    spelling = {name.rpartition(".")[2]: None for name in family.layer if ".experts." in name}
    parent = next(name.partition(".experts.")[0] for name in family.layer if ".experts." in name)
    layer: Shapes = {name: shape for name, shape in family.layer.items() if ".experts." not in name}
    for expert in range(number):
        layer |= gated(f"{parent}.experts.{expert}", width, tuple(spelling))  # type: ignore[arg-type]
    plain = {**family.plain, f"{parent}.gate.weight": (number, HIDDEN)}
    config = {**family.config, "num_experts": number, "num_experts_per_tok": top_k, "moe_intermediate_size": width}
    return replace(family, layer=layer, plain=plain, config=config)


#: What the layouts and mixes are tried on.
MODELS: dict[str, Family] = {
    **FAMILIES,
    "qwen3_moe, 5 experts, top-1": with_experts(FAMILIES["qwen3_moe"], 5, 128, 1),
    "qwen3_moe, 12 experts, top-8": with_experts(FAMILIES["qwen3_moe"], 12, 128, 8),
    "qwen3_moe, 96 wide": with_experts(FAMILIES["qwen3_moe"], 8, 96, 2),
    "qwen3_moe, experts fused in 16 bits": replace(FAMILIES["qwen3_moe"], fused=True),
}


def write_mix(folder: Path, model: str, mix: str) -> Path:
    """A checkpoint for each source that the mix takes, and the map."""
    family = MODELS[model]
    matrices = [f"{family.prefix}model.layers.{layer}.{name}" for layer in range(2) for name in family.matrices(layer)]
    mapping = dict(MIXES[mix](matrices))
    sources = ["bf16", *(name for name in SOURCES if name in mapping.values() and name != "bf16")]
    for name in sources:
        write_family(folder / name, family, *SOURCES[name])
    lines = [f"  {name}_path: {name}" for name in sources]
    rules = [f'    "{module}": {source}' for module, source in mapping.items()]
    path = folder / "map.yaml"
    path.write_text("\n".join(["mixed_precision:", *lines, "  default: bf16", "  weight_mapping:", *rules, ""]))
    return path
