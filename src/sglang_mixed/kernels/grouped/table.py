"""Where weights lie, as the Triton kernels read it: a line of addresses for each.

The addresses are those of tensors that stay where they are as long as a model is served, as CUDA graphs need it too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from .codec import Codec

#: The fields of a line after the codec's number, in the order of `decode.py`; a last one is kept for the bias.
TENSORS = ("weight", "scale", "zero", "factor", "order", "groups")


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """One arranged weight: its codec, its tensors (see `arrange`), and a bias [outputs] in the activations' dtype."""

    codec: Codec
    tensors: Mapping[str, torch.Tensor]
    bias: torch.Tensor | None = None


def codecs_of(weights: Iterable[Weight]) -> tuple[Codec, ...]:
    """The branches that kernels need for these weights, in an order that follows from them alone."""
    return tuple(sorted({weight.codec for weight in weights}))


def line(weight: Weight, codecs: Sequence[Codec]) -> list[int]:
    """The number of the codec, then addresses; 0 for what a weight does not have."""
    tensors = [weight.tensors.get(name) for name in TENSORS]
    assert all(tensor is None or tensor.is_contiguous() for tensor in tensors)
    return [codecs.index(weight.codec), *(0 if one is None else one.data_ptr() for one in (*tensors, weight.bias))]


def table(lines: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """int64 [weights, fields]."""
    return torch.tensor(lines, dtype=torch.int64, device=device)
