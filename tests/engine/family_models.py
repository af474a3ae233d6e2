"""Checkpoints of tiny models of random weights, in the hub's naming.

All siblings of a family have the same norms, routers, embeddings and biases; their matrices are what a packer made.
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from sglang_mixed.checkpoint.fused_experts import LAYOUTS, PROJECTIONS

from .families import FAMILIES, HIDDEN, LAYERS, VOCABULARY, Family, Shape, Shapes

sys.path.append(str(Path(__file__).parents[1] / "formats"))
import packers

Pack = Callable[[np.random.Generator, int, int], packers.Packed]


def plain(rng: np.random.Generator, out: int, columns: int) -> packers.Packed:
    """The packer of a BF16 checkpoint."""
    return packers.plain(rng, (out, columns), torch.bfloat16)


def plain_tensors(family: Family) -> dict[str, torch.Tensor]:
    """Norms, routers, biases and embeddings: the same in every sibling."""
    shapes: Shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if not family.is_tied:
        shapes["lm_head.weight"] = (VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in family.others(layer).items()}
    return {family.prefix + name: _plain_tensor(name, shape) for name, shape in {**shapes, **family.extra}.items()}


def _plain_tensor(name: str, shape: Shape) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    values = torch.randn(shape, generator=generator) * 0.1
    if name.endswith("e_score_correction_bias"):
        return values
    return (values + 1 if "norm" in name else values).to(torch.bfloat16)


def write_family(folder: Path, family: str | Family, pack: Pack = plain, factor: float = 0.1) -> Path:
    """A checkpoint of the family whose matrices `pack(rng, out, in)` made, their scales times `factor`."""
    folder.mkdir(parents=True)
    family = FAMILIES[family] if isinstance(family, str) else family
    tensors, quantization = plain_tensors(family), {}
    for layer in range(LAYERS):
        for local, (out, columns) in family.matrices(layer).items():
            module = f"{family.prefix}model.layers.{layer}.{local}"
            packed = pack(np.random.default_rng(zlib.crc32(module.encode())), out, columns)
            quantization = packed.config
            for tensor_name, tensor in packed.tensors.items():
                is_scale = tensor_name in ("scales", "weight_scale", "weight_scale_inv") or not packed.config
                tensors[f"{module}.{tensor_name}"] = tensor * factor if is_scale else tensor
    if family.fused and not quantization:
        tensors = fuse_experts(tensors, family.model_type)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    extra = {"quantization_config": quantization} if quantization else {}
    (folder / "config.json").write_text(json.dumps({**family.full_config(), **extra}))
    return folder


def fuse_experts(tensors: Mapping[str, torch.Tensor], model_type: str) -> dict[str, torch.Tensor]:
    """The tensors with all experts of a layer in one, as checkpoints of this family have them."""
    layout, found, parts = LAYOUTS[model_type], {}, {}
    for name, tensor in tensors.items():
        owner, inside, rest = name.partition(".experts.")
        if inside:
            expert, projection, local = rest.split(".")
            parts.setdefault((f"{owner}.experts", local), {})[int(expert), projection] = tensor
        else:
            found[name] = tensor
    for (owner, local), matrices in parts.items():
        for fused, projections in PROJECTIONS.items():
            together = []
            for expert in range(1 + max(number for number, _ in matrices)):
                rows = [matrices[expert, projection] for projection in projections]
                matrix = torch.stack(rows, 1).flatten(0, 1) if layout.interleaved else torch.cat(rows)
                together.append(matrix.T if layout.transposed and local == "weight" else matrix)
            found[f"{owner}.{fused}" + ("" if local == "weight" else f"_{local}")] = torch.stack(together)
    return found
