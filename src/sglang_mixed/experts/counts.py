"""How many tokens were routed to each expert: a frozen value that ranks, nodes and files hand on and add up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ExpertCountsError

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]
#: No count in a file may be larger: to here every program that reads JSON knows integers exactly.
LARGEST = 2**53


@dataclass(frozen=True, slots=True, eq=False)
class ExpertCounts:
    """Arrays are [layers, experts]; row i belongs to decoder layer `layers[i]`, numbered as in checkpoint names.

    `prefill`, `decode`: tokens routed to the expert, padding left out. `weights`: the sum of those tokens' router
    weights. `last_active`: unix seconds of the last activation, 0 for never. `since`, `until`: unix seconds.
    Raises ExpertCountsError where the parts do not fit each other.
    """

    layers: tuple[int, ...]
    prefill: Counts
    decode: Counts
    weights: Floats
    last_active: Floats
    since: float
    until: float
    top_k: int

    def __post_init__(self) -> None:
        shapes = {array.shape for array in (self.prefill, self.decode, self.weights, self.last_active)}
        if len(shapes) != 1 or self.prefill.ndim != 2 or len(self.prefill) != len(self.layers):
            raise ExpertCountsError(
                f"arrays of {sorted(shapes)} for {len(self.layers)} layers", rule="every array is [layers, experts]"
            )
        if len(set(self.layers)) != len(self.layers):
            raise ExpertCountsError("a layer stands twice", rule="one row per layer")

    @property
    def experts(self) -> int:
        """Routed experts per layer."""
        return int(self.prefill.shape[1])

    @property
    def total(self) -> Counts:
        """Tokens of prefill and decode together, int64 [layers, experts]."""
        return self.prefill + self.decode

    @property
    def tokens(self) -> Counts:
        """Tokens that passed each layer, int64 [layers]: every token activates `top_k` experts."""
        tokens: Counts = self.total.sum(axis=1) // max(self.top_k, 1)
        return tokens

    def __add__(self, other: ExpertCounts) -> ExpertCounts:
        """The sum over data-parallel ranks, nodes or exports. Raises ExpertCountsError for another model's counts."""
        ours, theirs = (self.layers, self.experts, self.top_k), (other.layers, other.experts, other.top_k)
        if ours != theirs:
            raise ExpertCountsError(
                f"counts of {len(other.layers)} layers x {other.experts} experts (top-{other.top_k}) added to those of "
                f"{len(self.layers)} x {self.experts} (top-{self.top_k})",
                rule="counts are added for one model: the same layers, experts and top-k",
                remedy="merge exports of one model only",
            )
        return ExpertCounts(
            self.layers,
            self.prefill + other.prefill,
            self.decode + other.decode,
            self.weights + other.weights,
            np.maximum(self.last_active, other.last_active),
            min(self.since, other.since),
            max(self.until, other.until),
            self.top_k,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, exact."""
        return {
            "layers": list(self.layers),
            "prefill": self.prefill.tolist(),
            "decode": self.decode.tolist(),
            "weights": self.weights.tolist(),
            "last_active": self.last_active.tolist(),
            "since": self.since,
            "until": self.until,
            "top_k": self.top_k,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ExpertCounts:
        """What `to_json` wrote. Raises ExpertCountsError for anything else."""
        try:
            layers = tuple(int(layer) for layer in value["layers"])
            prefill, decode = (_matrix(value[key], np.int64) for key in ("prefill", "decode"))
            weights, last_active = (_matrix(value[key], np.float64) for key in ("weights", "last_active"))
            since, until, top_k = float(value["since"]), float(value["until"]), int(value["top_k"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ExpertCountsError(f"not the counts of a model's experts: {error}") from error
        return cls(layers, prefill, decode, weights, last_active, since, until, top_k)

    @classmethod
    def zeros(cls, layers: tuple[int, ...], experts: int, top_k: int, since: float) -> ExpertCounts:
        """Nothing counted yet."""
        shape = len(layers), experts
        prefill, decode = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        return cls(layers, prefill, decode, np.zeros(shape), np.zeros(shape), since, since, top_k)


def _matrix(rows: Any, dtype: type) -> NDArray[Any]:
    matrix = np.asarray(rows)
    if matrix.size and not (matrix.dtype.kind == "i" if dtype is np.int64 else matrix.dtype.kind in "iuf"):
        raise ValueError(f"{matrix.dtype} where {dtype.__name__} belongs")
    if matrix.size and not (matrix.min() >= 0 and matrix.max() <= LARGEST):
        raise ValueError("a count is negative, no number or too large")
    return matrix.astype(dtype)
