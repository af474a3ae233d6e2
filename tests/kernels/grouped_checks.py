"""What `test_grouped.py` runs in processes where Triton interprets its kernels on CPU tensors.

`TRITON_INTERPRET` acts when kernels are imported: in a test's own process Triton stays what it is elsewhere.
"""

from __future__ import annotations

from typing import Any

import grouped_cases as cases
import numpy as np
import torch
from grouped_cases import DEVICE, generator

from sglang_mixed.formats.slicing import Region
from sglang_mixed.kernels.grouped import experts as grouped
from sglang_mixed.kernels.grouped.experts import Activation, ExpertWeights, GroupedExperts
from sglang_mixed.kernels.grouped.launch import Cut
from sglang_mixed.kernels.grouped.linear import DecodedLinear
from sglang_mixed.kernels.grouped.table import Weight

GUARD, VALUES = 0x5A, 64
Matrix = np.ndarray[Any, np.dtype[np.float64]]


def nmse(found: torch.Tensor, expected: Matrix) -> tuple[float, float]:
    """Normalized squared error of the worst column, and of the whole."""
    assert found.isfinite().all()
    error, energy = (found.double().cpu().numpy() - expected) ** 2, expected**2
    return float((error.sum(0) / energy.sum(0)).max()), float(error.sum() / energy.sum())


class Guards:
    """Every tensor that a kernel writes lies between guards, and begins as garbage; counts of parts end as zeros."""

    guards: list[torch.Tensor]
    _arrived: torch.Tensor

    def empty(self, *shape: int, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        size = int(np.prod(shape)) * (dtype or like.dtype).itemsize
        room = torch.full((size + 2 * VALUES,), GUARD, dtype=torch.uint8, device=like.device)
        room[VALUES : VALUES + size] = 0xFF  # NaN, or -1
        self.guards += [room[:VALUES], room[VALUES + size :]]
        return room[VALUES : VALUES + size].view(dtype or like.dtype).view(shape)

    def are_whole(self) -> bool:
        return not self._arrived.any() and all(bool((guard == GUARD).all()) for guard in self.guards)


class GuardedLinear(Guards, DecodedLinear):
    parts: int | None = None

    def cut(self, rows: int) -> Cut:
        return super().cut(rows) if self.parts is None else super().cut(rows)._replace(parts=self.parts)


class GuardedExperts(Guards, GroupedExperts):
    parts: tuple[int, int] | None = None

    def cuts(self, pairs: int) -> tuple[Cut, Cut]:
        first, second = super().cuts(pairs)
        if self.parts is None:
            return first, second
        return first._replace(parts=self.parts[0]), second._replace(parts=self.parts[1])


def linear(
    name: str,
    shape: tuple[int, int],
    rows: int,
    wanted: Region | None = None,
    dtype: torch.dtype = torch.float16,
    parts: int | None = None,
) -> tuple[float, float]:
    """The errors of a linear layer, of few rows in as many parts."""
    rng = generator(name, shape, rows)
    held, reference = cases.weight(name, rng, shape, wanted)
    if dtype != torch.float16 and name == "plain":
        held.tensors["weight"].data = held.tensors["weight"].to(dtype)
    x = torch.from_numpy(rng.normal(size=(rows, reference.shape[1]))).to(DEVICE, dtype)
    bias = torch.from_numpy(rng.normal(size=reference.shape[0])).to(DEVICE, dtype)
    expected = x.double().cpu().numpy() @ reference.T + bias.double().cpu().numpy()
    layer = GuardedLinear(held, *reference.shape)
    layer.guards, layer.parts = [], parts
    errors = nmse(layer.run(x, bias), expected)
    assert layer.are_whole()
    return errors


class Layer:
    """Experts whose gate, up and down take the formats in turn, and what they must compute."""

    def __init__(
        self, names: list[str], hidden: int, intermediate: int, activation: Activation, biased: bool, dtype: torch.dtype
    ) -> None:
        rng = generator(names, hidden, intermediate, activation.name)
        self.names, self.activation, self.biased = names, activation, biased
        weights, self.references = [], []
        for number, name in enumerate(names):
            shape = (hidden, intermediate) if number % 3 == 2 else (intermediate, hidden)
            held, reference = cases.weight(name, rng, shape)
            if name == "plain":
                held.tensors["weight"].data = held.tensors["weight"].to(dtype)
            bias = torch.from_numpy(rng.normal(size=shape[0])).to(DEVICE, dtype) if biased else None
            weights.append(Weight(held.codec, held.tensors, bias))
            self.references.append((reference, 0.0 if bias is None else bias.double().cpu().numpy()))
        experts = [ExpertWeights(*weights[first : first + 3]) for first in range(0, len(weights), 3)]
        self.layer = GuardedExperts(experts, hidden, intermediate, activation, 1.5)
        self.layer.guards = []
        self.hidden, self.number = hidden, len(experts)

    def expected(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> Matrix:
        output, inputs = np.zeros((len(x), self.hidden)), x.double().cpu().numpy()
        for expert in range(self.number):
            gate, up, down = self.references[3 * expert : 3 * expert + 3]
            factor = (weights.double() * (ids == expert)).sum(1).cpu().numpy()[:, None]
            hidden = self._activate(inputs @ gate[0].T + gate[1], inputs @ up[0].T + up[1])
            output += factor * (hidden @ down[0].T + down[1])
        return 1.5 * output

    def _activate(self, gate: Matrix, up: Matrix) -> Matrix:
        name, alpha, limit = self.activation.name, self.activation.alpha, self.activation.limit
        if name == "gelu":
            return torch.nn.functional.gelu(torch.from_numpy(gate)).numpy() * up
        if name == "silu":
            return gate / (1 + np.exp(-gate)) * up
        if name == "limited_silu":
            gate = np.minimum(gate, limit)
            return gate / (1 + np.exp(-gate)) * np.clip(up, -limit, limit)
        if name == "silu_limited":
            return np.minimum(gate / (1 + np.exp(-gate)), limit) * np.clip(up, -limit, limit)
        gate = np.minimum(gate, limit)
        return gate / (1 + np.exp(-alpha * gate)) * (np.clip(up, -limit, limit) + 1)


def inputs(
    tokens: int, hidden: int, experts: int, top_k: int, dtype: torch.dtype, skips: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, weights and ids; the last expert has no token.

    With `skips` every fifth id is -1, and one token has no other.
    """
    rng = generator(tokens, hidden, experts)
    x = torch.from_numpy(rng.normal(size=(tokens, hidden))).to(DEVICE, dtype)
    ids = np.array([rng.permutation(max(1, experts - 1))[:top_k] for _ in range(tokens)], np.int32)
    if skips:
        ids.reshape(-1)[::5] = -1
        ids[tokens // 2 : tokens // 2 + 1] = -1
    weights = torch.from_numpy(rng.uniform(0.1, 1, ids.shape)).float()
    return x, weights.to(DEVICE), torch.from_numpy(ids).to(DEVICE)


def experts(
    names: list[str],
    tokens: int,
    sizes: tuple[int, int] = (160, 96),
    top_k: int = 3,
    activation: tuple[Any, ...] = (),
    biased: bool = False,
    dtype: torch.dtype = torch.float16,
    at_once: int = 4096,
    reorders: bool = False,
    skips: bool = True,
    parts: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """A layer's errors, whether guards held, and (`reorders`) how far off another order of the tokens is."""
    grouped.TOKENS_AT_ONCE = at_once
    layer = Layer(names, *sizes, Activation(*activation), biased, dtype)
    layer.layer.parts = parts
    x, weights, ids = inputs(tokens, sizes[0], layer.number, top_k, dtype, skips)
    found = layer.layer.run(x, weights, ids)
    order = torch.from_numpy(generator("order").permutation(tokens)).to(DEVICE)
    other = layer.layer.run(x[order], weights[order], ids[order]) if reorders else found[order]
    expected = layer.expected(x, weights, ids) if tokens else np.empty(0)
    worst, whole = nmse(found, expected) if tokens else (0.0, 0.0)
    return {
        "worst": worst,
        "whole": whole,
        "guarded": layer.layer.are_whole(),
        "skipped": not found[tokens // 2].any() if tokens and skips else True,
        "reordered": float((other.double() - found[order].double()).abs().max()) if tokens else 0.0,
    }


def doubled_scale() -> float:
    """The worst column's error where one scale of one expert's is twice what it should be."""
    layer = Layer(["gptq", "awq", "packed"] * 2, 160, 96, Activation(), False, torch.float16)
    layer.layer._experts[0].down.tensors["scale"][1, 7] *= 2
    x, weights, ids = inputs(70, 160, 2, 1, torch.float16)
    return nmse(layer.layer.run(x, weights, ids), layer.expected(x, weights, ids))[0]
