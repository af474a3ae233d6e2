"""What is unusual about one checkpoint, or contradicts its own config: for a reader, nothing here is an error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint
from ..formats.base import CACHE_SCALES
from ..formats.mix import METHOD
from .families import is_embedding, num_experts, runs_in_16_bits, text_config
from .fold import fold
from .inspection import Kind

_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_SHOWN = 3


def oddities(checkpoint: Checkpoint, kinds: list[Kind]) -> list[str]:
    """One sentence each."""
    loaded = [kind for kind in kinds if kind.is_loaded]
    experts = [name for kind in loaded if kind.is_expert for name in kind.names]
    others = [name for kind in loaded if not kind.is_expert for name in kind.names]
    return [
        *_unread(kinds),
        *_claims(checkpoint, kinds),
        *_counts(checkpoint, others),
        *_experts(checkpoint, experts),
        *_norms([name for name in others if name.endswith("norm")]),
        *_aside(checkpoint, kinds),
        *_files(checkpoint),
    ]


def quantization(checkpoint: Checkpoint) -> str | None:
    """The method that the config names; of an exported mix, its sources too. None for a config without one."""
    config = checkpoint.quantization
    method = config.get("quant_method")
    if method == METHOD:
        return f"{METHOD} ({', '.join(config['sources'])})"
    return str(method) if config else None


def _unread(kinds: list[Kind]) -> Iterator[str]:
    for kind in kinds:
        if kind.error:
            yield f"{_names(kind.names)}: {kind.error.what}"


def _claims(checkpoint: Checkpoint, kinds: list[Kind]) -> Iterator[str]:
    """What the config says of formats and dtypes, and the tensors do not bear out."""
    weights = [kind for kind in kinds if kind.is_weight and kind.format]
    labels = dict.fromkeys(kind.label for kind in weights if kind.format and kind.format.name != "plain")
    method = quantization(checkpoint)
    if method and not labels:
        yield f"config.json says {method}, and no module is quantized"
    if labels and not method:
        yield f"config.json has no quantization_config, and modules are {', '.join(labels)}"
    if len(labels) > 1:
        yield f"quantized in {len(labels)} formats: {', '.join(labels)}"
    plain = [kind for kind in weights if kind.format and kind.format.name == "plain"]
    left = [name for kind in plain if labels and _is_matrix(kind) for name in kind.names if not runs_in_16_bits(name)]
    if left:
        yield f"{len(left)} matrices are not quantized: {_names(left)}"
    text = text_config(checkpoint.config)
    said = str(text.get("dtype") or text.get("torch_dtype") or checkpoint.config.get("torch_dtype") or "")
    other = [name for kind in plain if said in _DTYPES and kind.label != _DTYPES[said] for name in kind.names]
    if other:
        found = dict.fromkeys(kind.label for kind in plain if kind.label != _DTYPES[said])
        yield f"config.json says {said}, and {len(other)} modules are {' and '.join(found)}: {_names(other)}"


def _counts(checkpoint: Checkpoint, names: list[str]) -> Iterator[str]:
    """Layers and tokens that the config counts, and the files hold."""
    text = text_config(checkpoint.config)
    layers, said = {number for name in names if (number := _layer(name)) is not None}, text.get("num_hidden_layers")
    if layers and said is not None and layers != set(range(said)):
        yield f"config.json counts {said} layers, the files hold {len(layers)}"
    words = text.get("vocab_size")
    for name in filter(is_embedding, names):
        weight = checkpoint.modules[name].get("weight")
        if words and weight and weight.shape[0] != words:
            yield f"config.json counts {words} tokens, {name} has {weight.shape[0]} rows"


def _experts(checkpoint: Checkpoint, names: list[str]) -> Iterator[str]:
    owners = [name.partition(".experts.")[0] for name in names if name.endswith((".down_proj", ".w2"))]
    wanted, layers = num_experts(checkpoint.config), len(set(owners))
    if len(owners) != wanted * layers:
        yield f"config.json counts {wanted} experts, {layers} layers hold {len(owners)} in all"


def _norms(names: list[str]) -> Iterator[str]:
    """Norms that some layers have and others lack."""
    found: dict[str, set[int]] = {}
    for name in names:
        number = _layer(name)
        if number is not None:
            before, _, after = name.partition(f".layers.{number}.")
            found.setdefault(f"{before}.layers.{{}}.{after}", set()).add(number)
    everywhere = set[int]().union(*found.values())
    for template, layers in found.items():
        if lacking := everywhere - layers:
            yield f"{_names([template.format(number) for number in sorted(lacking)])}: not there, as in other layers"


def _aside(checkpoint: Checkpoint, kinds: list[Kind]) -> Iterator[str]:
    """What is held and not loaded, or the other way round."""
    if aside := [name for kind in kinds if not kind.is_loaded for name in kind.names]:
        yield f"{len(aside)} modules are never loaded: {_names(aside)}"
    if scaled := [name for kind in kinds if not CACHE_SCALES.isdisjoint(kind.tensors) for name in kind.names]:
        yield f"scales of a quantized key-value cache stand beside {len(scaled)} modules: {_names(scaled)}"
    config: Any = checkpoint.config
    if config.get("tie_word_embeddings", text_config(config).get("tie_word_embeddings")):
        yield "the head is tied to the embeddings"
    if checkpoint.has_fused_experts:
        yield "a layer's experts are in one tensor each, and read as experts of their own"


def _files(checkpoint: Checkpoint) -> Iterator[str]:
    known = set(checkpoint.files)
    if others := sorted(path.name for path in Path(checkpoint.path).glob("*.safetensors") if path not in known):
        yield f"{len(others)} .safetensors files are not the checkpoint's: {', '.join(others[:_SHOWN])}"


def _is_matrix(kind: Kind) -> bool:
    return kind.format is not None and len(kind.format.shape) == 2


def _layer(name: str) -> int | None:
    number = name.partition(".layers.")[2].partition(".")[0]
    return int(number) if number.isdecimal() else None


def _names(names: list[str]) -> str:
    patterns = fold(names)
    more = f", and {len(patterns) - _SHOWN} more" if len(patterns) > _SHOWN else ""
    return ", ".join(patterns[:_SHOWN]) + more
