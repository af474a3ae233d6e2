"""In which format each expert lies in memory, as numbers into a list of labels."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ExpertCountsError
from ..formats import label_of
from ..plan.families import expert_of

if TYPE_CHECKING:
    from ..plan import Plan

_LAYER = re.compile(r"\.layers\.(\d+)\.")
#: An expert of which the plan says nothing.
UNKNOWN = -1


@dataclass(frozen=True, slots=True, eq=False)
class ExpertFormats:
    """`cells` [layers, experts] are numbers into `labels`, -1 where unknown; rows as in the counts they go with."""

    labels: tuple[str, ...]
    cells: NDArray[np.int64]

    def label(self, row: int, expert: int) -> str | None:
        """The format of one expert; None where it is unknown."""
        number = int(self.cells[row, expert])
        return None if number == UNKNOWN else self.labels[number]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"labels": list(self.labels), "cells": self.cells.tolist()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ExpertFormats:
        """What `to_json` wrote. Raises ExpertCountsError for anything else."""
        try:
            labels = tuple(map(str, value["labels"]))
            cells = np.asarray(value["cells"])
            if cells.ndim != 2 or (cells.size and (cells.dtype.kind != "i" or cells.max() >= len(labels))):
                raise ValueError("a cell names no label")
        except (KeyError, TypeError, ValueError) as error:
            raise ExpertCountsError(f"not the formats of experts: {error}") from error
        return cls(labels, np.maximum(cells.astype(np.int64), UNKNOWN))


def expert_formats(plan: Plan, layers: tuple[int, ...], experts: int) -> ExpertFormats:
    """The formats of a plan's experts. One whose matrices differ has all their labels, joined by ` + `."""
    rows = {layer: row for row, layer in enumerate(layers)}
    label = functools.cache(label_of)
    found: dict[tuple[int, int], dict[str, None]] = {}
    for module in plan.modules.values():
        place = expert_of(module.name.rpartition(".")[0])
        layer = _LAYER.search(f".{module.name}")
        if place and layer and int(layer[1]) in rows and place[1] < experts:
            found.setdefault((rows[int(layer[1])], place[1]), {})[label(module.format)] = None
    labels: dict[str, int] = {}
    cells = np.full((len(layers), experts), UNKNOWN, np.int64)
    for cell, parts in found.items():
        cells[cell] = labels.setdefault(" + ".join(parts), len(labels))
    return ExpertFormats(tuple(labels), cells)
