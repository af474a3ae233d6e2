"""An attack: what it breaks in a sound mix, and the error that must come of it. And the tools to break it with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from tests.models import tensors, write, write_map

from sglang_mixed.errors import MixedPrecisionError

Tensors = dict[str, torch.Tensor]
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
INT32_MAX = (1 << 31) - 1
Q = "model.layers.0.self_attn.q_proj"
EXPERT = "model.layers.0.mlp.experts.1.down_proj"


class Attack(NamedTuple):
    """`build` breaks the mix in a folder. Expected: exactly this error, about this file and tensor, by such a rule.

    `error` is None where what was smuggled in must simply be left alone.
    """

    name: str
    build: Callable[[Path], object]
    error: type[MixedPrecisionError] | None
    rule: str
    file: str | None = None
    tensor: str | None = None


def write_mix(folder: Path) -> Path:
    """A sound mix: one layer of two experts in BF16, in FP8, and in GPTQ as two shards. Returns its map."""
    write(folder / "bf16", "bf16", layers=1, experts=2)
    write(folder / "fp8", "fp8", layers=1, experts=2)
    write(folder / "gptq", "gptq", layers=1, experts=2, shards=2, change=_quantize)
    mapping = {"model.layers.*.self_attn.*_proj": "fp8", "model.layers.*.mlp.experts.*.*": "gptq"}
    mapping["model.layers.0.mlp.experts.0.**"] = "fp8"
    return write_map(folder, mapping, default="bf16", bf16="bf16", fp8="fp8", gptq="gptq")


def _quantize(found: Tensors) -> None:
    """Put the model's own weights in place of zeros: 4 bits, groups of 32 inputs, the middle at 8."""
    for name, weight in tensors("bf16", layers=1, experts=2).items():
        module = name.removesuffix(".weight")
        if f"{module}.qweight" not in found:
            continue
        grouped = weight.float().T.reshape(-1, 32, len(weight))
        scales = grouped.abs().amax(1) / 7
        codes = (grouped / scales[:, None]).round().clamp(-8, 7).reshape(-1, 8, len(weight)).to(torch.int64) + 8
        words = (codes << torch.arange(0, 32, 4)[None, :, None]).sum(1)
        found[f"{module}.qweight"] = torch.where(words > INT32_MAX, words - (1 << 32), words).to(torch.int32)
        found[f"{module}.scales"] = scales.half()


def edit_json(file: Path, **changes: Any) -> None:
    """Set keys of a JSON object, or remove those given as `...`."""
    value = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: one for key, one in value.items() if one is not ...}))


def edit_quantization(file: Path, **changes: Any) -> None:
    """The same in its quantization_config."""
    config = json.loads(file.read_text())["quantization_config"]
    edit_json(file, quantization_config={key: one for key, one in {**config, **changes}.items() if one is not ...})


def edit_index(folder: Path, **changes: Any) -> None:
    """Set entries of the GPTQ source's weight_map, or remove those given as `...`."""
    file = folder / "gptq" / INDEX
    weight_map = {**json.loads(file.read_text())["weight_map"], **changes}
    edit_json(file, weight_map={key: one for key, one in weight_map.items() if one is not ...})


def edit_tensors(file: Path, change: Callable[[Tensors], object]) -> None:
    """Change the tensors of one file."""
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def holding(folder: Path, tensor: str) -> Path:
    """The GPTQ source's shard that holds a tensor."""
    return folder / "gptq" / json.loads((folder / "gptq" / INDEX).read_text())["weight_map"][tensor]


def split(file: Path) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header and data."""
    raw = file.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def join(file: Path, header: object, data: bytes, length: int | None = None) -> None:
    """Write a safetensors file of this header (an object, or bytes as they are), and of a length that may lie."""
    raw = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    file.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)


def edit_header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """A builder that changes the header of the BF16 source's file; its data stays."""

    def build(folder: Path) -> None:
        header, data = split(folder / "bf16" / SINGLE)
        changed = change(header)
        join(folder / "bf16" / SINGLE, header if changed is None else changed, data)

    return build


def rewrite_map(old: str, new: str) -> Callable[[Path], None]:
    """A builder that replaces text of the map."""

    def build(folder: Path) -> None:
        file = folder / "map.yaml"
        text = file.read_text()
        if old not in text:
            raise ValueError(f"the map does not hold {old!r}")
        file.write_text(text.replace(old, new))

    return build


def append_map(text: str) -> Callable[[Path], None]:
    """A builder that puts text at the end of the map."""

    def build(folder: Path) -> None:
        with (folder / "map.yaml").open("a") as file:
            file.write(text)

    return build
