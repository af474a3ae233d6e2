"""The search: candidates, errors and a budget in, the best mix out, with the frontier that it lies on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..errors import BudgetError
from ..plan import Plan
from ..plan.candidates import Candidates
from .budget import Budget, costs
from .program import Program
from .use import Errors

#: Budgets that a frontier is drawn at, and how exactly.
POINTS, POINT_GAP, POINT_SECONDS = 9, 1e-2, 5.0


@dataclass(frozen=True, slots=True)
class Mix:
    """`choice`: unit -> source. `rank_bytes`: of the fullest rank. `bound`: the least error that is not ruled out."""

    choice: dict[str, str]
    error: float
    rank_bytes: int
    bound: float

    @property
    def gap(self) -> float:
        """How much of the error a perfect search might still save, at most."""
        return max(0.0, 1 - self.bound / self.error) if self.error else 0.0


@dataclass(frozen=True, slots=True)
class Point:
    """One mix in the picture."""

    name: str
    rank_bytes: int
    error: float


class Search:
    """All mixes of some sources, each error being the sum of its units'."""

    def __init__(self, candidates: Candidates, errors: Errors, budget: Budget, formats_per_group: int = 3) -> None:
        self.candidates, self.budget = candidates, budget
        self._errors, self._costs = errors, costs(candidates, budget)
        self._home = {module: unit.name for unit in candidates.units.values() for module in unit.modules}
        self._program = Program(candidates, errors, self._costs, formats_per_group)

    def best(self) -> Mix:
        """The mix of least error within the budget. Raises BudgetError where there is none."""
        solution = self._program.solve(self.budget.limit)
        return Mix(solution.choice, solution.error, self._bytes(solution.choice), solution.bound)

    def frontier(self) -> list[Point]:
        """The least error at `POINTS` budgets between the smallest mix and the base, each within one percent."""
        largest = self._bytes(self.candidates.uniform(self.candidates.base))
        least = self._program.least_bytes
        points = []
        for limit in np.linspace(least, largest, POINTS):
            try:
                solution = self._program.solve(max(int(limit), least), POINT_GAP, POINT_SECONDS)
            except BudgetError:  # below what the cap on formats and the ties leave
                continue
            points.append(Point("frontier", self._bytes(solution.choice), solution.error))
        return points

    def uniform(self) -> list[Point]:
        """Everything that each source can give from it, and the rest from the base."""
        found = []
        for source in self.candidates.checkpoints:
            choice = self.candidates.uniform(source)
            found.append(Point(source, self._bytes(choice), sum(self._errors[pair] for pair in choice.items())))
        return found

    def plan(self, mix: Mix) -> Plan:
        """The plan of a mix."""
        return self.candidates.with_choice(mix.choice)

    def error_of(self, modules: Iterable[str], source: str) -> float | None:
        """What the units of these modules add if they come from one source; None where they cannot."""
        pairs = {(self._home[name], source) for name in modules if name in self._home}
        return sum(self._errors[pair] for pair in pairs) if all(pair in self._errors for pair in pairs) else None

    def _bytes(self, choice: dict[str, str]) -> int:
        return int(self._costs.total(choice).max())
