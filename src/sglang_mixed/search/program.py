"""The integer program: one source for every unit, the least sum of errors, within every rank's bytes.

x[u, s] = 1 where unit u comes from source s; z[g, k] = 1 where group g uses format k. SciPy's HiGHS solves it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from ..errors import BudgetError, UnsupportedError
from ..plan.candidates import Candidates
from .budget import Costs
from .use import Errors

#: HiGHS works in floating point: the objective and the rows of bytes are scaled to about this.
_SCALE = 1000.0
#: One row of the matrix: column -> factor.
Row = dict[int, float]


class Solution(NamedTuple):
    """`bound`: no choice within the limit has a smaller error, of which this is proven."""

    choice: dict[str, str]
    error: float
    bound: float


class Program:
    """Built once for a model, solved for any limit."""

    def __init__(self, candidates: Candidates, errors: Errors, costs: Costs, formats_per_group: int) -> None:
        self._candidates, self._costs, self._cap = candidates, costs, formats_per_group
        self._kinds = {pair: candidates.units[pair[0]].kind(pair[1]) for pair in errors}
        self._pairs = self._worth_choosing(errors)
        self._columns = {pair: column for column, pair in enumerate(self._pairs)}
        self._errors = np.array([errors[pair] for pair in self._pairs])
        self._bytes = np.array([costs.choices[pair] for pair in self._pairs], np.float64).T
        groups: dict[str, dict[str, None]] = {}
        for name, source in self._pairs:
            if group := candidates.units[name].group:
                groups.setdefault(group, {})[self._kinds[name, source]] = None
        #: (group, format) -> column of its switch, where the cap matters.
        self._switches = {
            (group, kind): len(self._pairs) + number
            for number, (group, kind) in enumerate(
                (g, k) for g, ks in groups.items() if len(ks) > self._cap for k in ks
            )
        }
        self._constraints = [*self._one_source_each(), *self._all_or_none(), *self._capped()]

    @property
    def least_bytes(self) -> int:
        """Bytes of the fullest rank if every unit is as small as it can be."""
        return int(self._costs.total(self._smallest()).max())

    def solve(self, limit: int, gap: float = 2e-3, seconds: float = 25.0) -> Solution:
        """The choice within `limit` bytes a rank; its error is proven to a relative `gap`, or `seconds` are over.

        Raises BudgetError where there is none.
        """
        allowed = limit
        for _ in range(8):
            solution = self._solve(allowed, gap, seconds)
            excess = int(self._costs.total(solution.choice).max()) - limit
            if excess <= 0:
                return solution
            allowed -= excess  # a few bytes, by HiGHS's tolerance
        raise AssertionError("HiGHS does not keep the limit")

    def _solve(self, limit: int, gap: float, seconds: float) -> Solution:
        optimize, sparse = _scipy()
        rows = sparse.csr_matrix(self._bytes * (_SCALE / limit))
        rows.resize(len(self._bytes), self._width)
        room = (limit - self._costs.fixed.astype(np.float64)) * (_SCALE / limit)
        scale = _SCALE / max(float(self._errors.sum()), 1e-300)
        objective = np.zeros(self._width)
        objective[: len(self._pairs)] = self._errors * scale
        result = optimize.milp(
            objective,
            integrality=np.ones(self._width),
            bounds=optimize.Bounds(0, 1),
            constraints=[*self._constraints, optimize.LinearConstraint(rows, -np.inf, room)],
            options={"mip_rel_gap": gap, "time_limit": seconds},
        )
        if result.x is None:
            raise self._too_small(limit)
        chosen = np.flatnonzero(result.x[: len(self._pairs)] > 0.5)
        bound = max(0.0, float(result.mip_dual_bound)) / scale
        return Solution(dict(self._pairs[column] for column in chosen), float(self._errors[chosen].sum()), bound)

    def _too_small(self, limit: int) -> BudgetError:
        least = self.least_bytes
        what = f"no mix has {limit:,} bytes a rank or less"
        if least > limit:
            return BudgetError(
                what, rule=f"the smallest that these sources give is {least:,} bytes", remedy="raise the budget"
            )
        return BudgetError(
            f"{what}, or none was found in time",
            rule=f"at most {self._cap} formats a layer, and one source where smoothing ties a norm to its readers",
            remedy="raise the budget, or --formats-per-layer",
        )

    @property
    def _width(self) -> int:
        return len(self._pairs) + len(self._switches)

    def _smallest(self) -> dict[str, str]:
        units = self._candidates.units.values()
        return {
            unit.name: min(unit.choices, key=lambda source: int(self._costs.choices[unit.name, source].sum()))
            for unit in units
        }

    def _worth_choosing(self, errors: Errors) -> list[tuple[str, str]]:
        """Without what another source gives as well in the same format, at no more bytes. Ties need all of theirs."""
        tied = {(name, tie.source) for tie in self._candidates.ties for name in tie.units}
        worth = []
        for unit in self._candidates.units.values():
            kept: list[tuple[str, str]] = []
            pairs = [(unit.name, source) for source in unit.choices]
            for pair in sorted(pairs, key=lambda pair: (errors[pair], pair[1] != self._candidates.base)):
                better = (other for other in kept if self._kinds[other] == self._kinds[pair] and other not in tied)
                if pair in tied or not any(
                    (self._costs.choices[other] <= self._costs.choices[pair]).all() for other in better
                ):
                    kept.append(pair)
            worth += kept
        return worth

    def _one_source_each(self) -> list[Any]:
        rows: dict[str, Row] = {}
        for (name, _), column in self._columns.items():
            rows.setdefault(name, {})[column] = 1
        return self._rows(rows.values(), 1, 1)

    def _all_or_none(self) -> list[Any]:
        rows = [
            {self._columns[name, tie.source]: 1.0, self._columns[tie.units[0], tie.source]: -1.0}
            for tie in self._candidates.ties
            for name in tie.units[1:]
        ]
        return self._rows(rows, 0, 0)

    def _capped(self) -> list[Any]:
        """A choice needs its group's format, and a group has at most so many."""
        needs = []
        for pair, column in self._columns.items():
            switch = self._switches.get((self._candidates.units[pair[0]].group or "", self._kinds[pair]))
            if switch is not None:
                needs.append({column: 1.0, switch: -1.0})
        caps: dict[str, Row] = {}
        for (group, _), switch in self._switches.items():
            caps.setdefault(group, {})[switch] = 1.0
        return [*self._rows(needs, -np.inf, 0), *self._rows(caps.values(), -np.inf, self._cap)]

    def _rows(self, rows: Iterable[Row], low: float, high: float) -> list[Any]:
        optimize, sparse = _scipy()
        table = list(rows)
        if not table:
            return []
        places = np.array([(number, column) for number, row in enumerate(table) for column in row]).T
        factors = [factor for row in table for factor in row.values()]
        matrix = sparse.csr_matrix((factors, (places[0], places[1])), shape=(len(table), self._width))
        return [optimize.LinearConstraint(matrix, low, high)]


def _scipy() -> tuple[Any, Any]:
    try:
        from scipy import optimize, sparse
    except ImportError as error:
        raise UnsupportedError(
            "SciPy is not installed", rule="its HiGHS solves the plan", remedy="pip install 'sglang-mixed[plan]'"
        ) from error
    return optimize, sparse
