"""What a mix may cost, and what each choice costs: bytes of ranks, or bits a weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import BudgetError
from ..plan import Plan, Rank
from ..plan.candidates import Candidates

Bytes = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Budget:
    """The most bytes of weights that any one of the ranks may hold, exactly as `plan.rank` counts them."""

    limit: int
    tp: int = 1
    ep: int = 1

    @classmethod
    def of_bits(cls, bits: float, plan: Plan) -> Budget:
        """So many bits for each weight of the model, on average over all that is served, embeddings included."""
        if not bits > 0:
            raise BudgetError(f"{bits} bits a weight", rule="more than 0 bits", remedy="give --bits 4.5, for example")
        return cls(int(bits * plan.bf16_bytes / 16))


@dataclass(frozen=True, slots=True)
class Costs:
    """Bytes on each rank that differs from the others: of what is fixed, and of each (unit, source)."""

    fixed: Bytes
    choices: Mapping[tuple[str, str], Bytes]

    def total(self, choice: Mapping[str, str]) -> Bytes:
        """Bytes on each of the ranks."""
        return np.asarray(self.fixed + sum(self.choices[pair] for pair in choice.items()), np.int64)


def costs(candidates: Candidates, budget: Budget) -> Costs:
    """What every choice costs on every rank. Raises ParallelismError where the model cannot be cut that way."""
    columns = [_on_rank(candidates, Rank(budget.tp, budget.ep, number)) for number in range(budget.tp)]
    # Ranks that cut the same experts hold equally much: they are one line of the program.
    distinct = list({tuple(column.values()): column for column in columns}.values())
    fixed = np.array([column["", ""] for column in distinct], np.int64)
    pairs = [pair for pair in distinct[0] if pair[0]]
    return Costs(fixed, {pair: np.array([column[pair] for column in distinct], np.int64) for pair in pairs})


def _on_rank(candidates: Candidates, rank: Rank) -> dict[tuple[str, str], int]:
    """(unit, source) -> bytes on one rank; under ("", "") those of all that is in no unit."""
    found: dict[tuple[str, str], int] = {}
    for source in candidates.checkpoints:
        plan = candidates.with_choice(candidates.uniform(source)).rank(rank)
        of = {name: plan.module_bytes(name) for name in plan.parts}
        for unit in candidates.units.values():
            if source in unit.choices:
                found[unit.name, source] = sum(of.get(name, 0) for name in unit.modules)
        if source == candidates.base:
            whole = of
            found["", ""] = sum(of.values()) - sum(found[name, source] for name in candidates.units)
        for tie in candidates.ties:
            if tie.source == source:
                found[tie.units[0], source] += sum(of[name] - whole[name] for name in tie.followers)
    return found
