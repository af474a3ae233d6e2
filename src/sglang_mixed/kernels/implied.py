"""Tensors that a format's parameters determine: checked on the way in, left out of memory, rebuilt on the way out."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch

from ..errors import InconsistentFormatError
from ..formats import ModuleFormat, get_format
from ..formats.base import TORCH_DTYPES
from ..formats.gptq import PACKING, GPTQParameters
from .base import Tensors


@functools.lru_cache(maxsize=256)
def implied(format: ModuleFormat) -> Tensors:
    """GPTQ's zero points if it is symmetric, and its g_idx without act-order; the weight_shape of packed integers."""
    # Kept for all callers, of whom some build a model on another default device.
    with torch.device("cpu"):
        return _implied(format)


def _implied(format: ModuleFormat) -> Tensors:
    if format.name == "packed":
        (dtype,) = get_format("packed").tensors(format.parameters, format.shape)["weight_shape"].dtypes
        return {"weight_shape": torch.tensor(format.shape, dtype=TORCH_DTYPES[dtype])}
    if format.name != "gptq":
        return {}
    p: GPTQParameters = format.parameters
    specs, tensors = get_format("gptq").tensors(p, format.shape), {}
    if p.symmetric:
        groups, words = specs["qzeros"].shape
        tensors["qzeros"] = _constant_words(p, words).repeat(groups, 1)
    if p.has_g_idx and not p.act_order:
        tensors["g_idx"] = torch.arange(format.shape[1], dtype=torch.int32) // p.group_size
    return tensors


def without_implied(tensors: Mapping[str, torch.Tensor], format: ModuleFormat) -> Tensors:
    """The tensors that must be kept. Raises InconsistentFormatError where an implied one is not what it should be."""
    expected = implied(format)
    for name, tensor in expected.items():
        if not torch.equal(tensors[name], tensor):
            raise _contradiction(name)
    return {name: tensor for name, tensor in tensors.items() if name not in expected and name != "bias"}


def _contradiction(name: str) -> InconsistentFormatError:
    key, rule = _REASONS[name]
    return InconsistentFormatError(
        f"config.json's {key} denies what {name} says",
        tensor=name,
        rule=rule,
        remedy=f"correct {key} in quantization_config, or map this module to another source",
    )


_REASONS = {
    "qzeros": ("sym", "symmetric weights have their zero point in the middle of the codes, everywhere"),
    "weight_shape": ("config_groups", "weight_shape repeats the weight's shape"),
    "g_idx": ("desc_act", "without desc_act column i is in group i // group_size"),
}


def _constant_words(p: GPTQParameters, words: int) -> torch.Tensor:
    """int32 [words]: the bit stream of a symmetric zero point as it is stored."""
    num_values, num_words = PACKING[p.bits]
    stored = (1 << (p.bits - 1)) - p.zero_offset
    stream = sum(stored << (p.bits * place) for place in range(num_values))
    unit = [(stream >> (32 * word)) & 0xFFFFFFFF for word in range(num_words)]
    signed = [word - (1 << 32) if word >> 31 else word for word in unit]
    return torch.tensor(signed, dtype=torch.int32).repeat(words // num_words)
