"""`sglang-mixed plan`: the best map for a budget."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import BudgetError, ExpertExportError
from ..experts.files import write_whole
from ..plan import Plan
from ..plan.candidates import Candidates, find_candidates
from ..search import Budget, Mix, Search, map_text, resolves_to, weighted_errors
from ..sensitivity import Measure, Sensitivity, nominal_sensitivity, read_sensitivity
from .check import human
from .experts import gather
from .export import parse_size
from .sources import read_sources
from .tables import number_table

#: What a mix's error is, by how it was measured.
MEANING = {
    Measure.NOMINAL: "expected relative squared error of the weights, summed over what a token meets",
    Measure.WEIGHT: "relative squared error of the weights, summed over what a token meets",
    Measure.DIVERGENCE: "sum of the units' KL divergences, nats a token",
}


def run(
    given: Sequence[str],
    output: Path,
    *,
    budget: str | None = None,
    bits: float | None = None,
    tp: int = 1,
    ep: int = 1,
    sensitivity: Path | None = None,
    experts: str | None = None,
    formats_per_layer: int = 3,
    split: bool = False,
    picture: Path | None = None,
    allow_different_base: bool = False,
) -> dict[str, Any]:
    """Search, write the map (and the picture), and read the map back; what was found, as JSON values.

    Raises BudgetError where no mix is as small as asked.
    """
    described = read_sources(given, allow_different_base=allow_different_base)
    candidates = find_candidates(described, split=split)
    measured = read_sensitivity(sensitivity) if sensitivity else nominal_sensitivity(candidates)
    errors = weighted_errors(candidates, measured, gather([experts]) if experts else None)
    search = Search(candidates, errors, _budget(candidates, budget, bits, tp, ep), formats_per_layer)
    mix = search.best()
    plan = search.plan(mix)
    _write(output, map_text(search, mix, _heading(search, mix, measured, plan, experts), output.resolve().parent))
    if not resolves_to(output, plan):
        raise AssertionError(f"{output} does not choose what was planned")
    report = _report(search, mix, measured, plan) | {"map": str(output), "lines": len(output.read_text().splitlines())}
    if picture is not None:
        from ..search.picture import draw

        frontier = search.frontier()
        draw(picture, mix, frontier, search.uniform(), measured.measure.value)
        report |= {"picture": str(picture), "frontier": [asdict(point) for point in frontier]}
    return report


def _budget(candidates: Candidates, budget: str | None, bits: float | None, tp: int, ep: int) -> Budget:
    if (budget is None) == (bits is None):
        raise BudgetError("no budget, or two", rule="one of --budget and --bits", remedy="give --budget 24GiB")
    if budget is not None:
        return Budget(parse_size(budget), tp, ep)
    if tp > 1:
        raise BudgetError(
            f"--bits with --tp {tp}", rule="bits are of the whole model", remedy="give --budget, of one rank, instead"
        )
    assert bits is not None
    return Budget.of_bits(bits, candidates.plan)


def _report(search: Search, mix: Mix, measured: Sensitivity, plan: Plan) -> dict[str, Any]:
    return {
        "budget_bytes": search.budget.limit,
        "rank_bytes": mix.rank_bytes,
        "weight_bytes": plan.weight_bytes(),
        "bits": 16 * plan.weight_bytes() / plan.bf16_bytes,
        "tp": search.budget.tp,
        "ep": search.budget.ep,
        "measure": measured.measure.value,
        "error": mix.error,
        "error_bound": mix.bound,
        "gap": mix.gap,
        "units": len(search.candidates.units),
        "rows": [asdict(row) for row in plan.rows()],
        "uniform": [asdict(point) for point in search.uniform()],
    }


def _heading(search: Search, mix: Mix, measured: Sensitivity, plan: Plan, experts: str | None) -> list[str]:
    budget = search.budget
    ranks = f" on the fullest of {budget.tp} ranks (ep {budget.ep})" if budget.tp > 1 else ""
    weighted = f", experts by their use in {experts}" if experts else ""
    return [
        f"Made by: {shlex.join(['sglang-mixed', *sys.argv[1:]])}",
        f"{mix.rank_bytes:,} bytes of weights{ranks}, {budget.limit:,} allowed; "
        f"{16 * plan.weight_bytes() / plan.bf16_bytes:.2f} bits a weight",
        f"error {mix.error:.4g}: {MEANING[measured.measure]}{weighted}",
        f"no mix within the budget has less than {mix.bound:.4g}, {mix.gap:.2%} below",
    ]


def _write(path: Path, text: str) -> None:
    try:
        write_whole(path, text.encode())
    except ExpertExportError as error:
        raise BudgetError(error.what, file=path, remedy=error.remedy) from error


def render(report: dict[str, Any]) -> None:
    """Print the mix beside what each source alone would give."""
    table = number_table(f"error ({report['measure']}) and bytes", "mix", "memory", "error")
    for point in report["uniform"]:
        table.add_row(f"all {point['name']}", human(point["rank_bytes"]), f"{point['error']:.4g}")
    table.add_section()
    table.add_row("this plan", human(report["rank_bytes"]), f"{report['error']:.4g}")
    console = Console(soft_wrap=True, highlight=False)
    console.print(table)
    console.print(
        f"{report['bits']:.2f} bits a weight; {human(report['budget_bytes'])} allowed; "
        f"at most {report['gap']:.2%} of the error could be saved by any other mix within the budget"
    )
    console.print(f"written: {report['map']} ({report['lines']} lines), reads back to the same choice", markup=False)
