"""docs/reliability.md from docs/reliability.jsonl: the latest run of each kind, and what the fuzzing added up to.

python -m attacks.run | tee -a docs/reliability.jsonl        # and likewise python -m tests.fuzz.run
python scripts/reliability/report.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS, PAGE = ROOT / "docs" / "reliability.jsonl", ROOT / "docs" / "reliability.md"
Run = dict[str, Any]


def main() -> int:
    runs = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    PAGE.write_text(page(runs))
    return 0


def page(runs: list[Run]) -> str:
    latest = {run["what"]: run for run in runs}
    rows = [row for what, describe in ROWS.items() if what in latest for row in describe(latest[what])]
    rows[1:1] = fuzzing([run for run in runs if run["what"] == "fuzz"])
    lines = ["# Reliability", "", INTRODUCTION, "", "| what | figure | run |", "| --- | --- | --- |"]
    lines += [f"| {what} | {figure} | {run} |" for what, figure, run in rows]
    lines += ["", LIMITS, "", "## Faults put into our own code", "", FAULTS_INTRODUCTION, ""]
    lines += ["| fault | in | caught by |", "| --- | --- | --- |"]
    for fault in latest.get("faults", {}).get("faults", []):
        lines.append(f"| {fault['name']} | `{fault['file']}` | {fault['caught_by'] or '**nothing**'} |")
    return "\n".join([*lines, ""])


def attacks(run: Run) -> list[tuple[str, str, str]]:
    figure = f"{run['kinds']} kinds, {run['refused']} refused, {run['left_alone']} left alone as they must be"
    return [("attacks (each within 64 MiB)", figure, where(run))]


def fuzzing(runs: list[Run]) -> list[tuple[str, str, str]]:
    if not runs:
        return []
    mutants = sum(run["mutants"] for run in runs)
    loaded = sum(count for run in runs for what, count in run["outcomes"].items() if what.endswith(": loaded"))
    seeds = sum(run.get("seeds", 1) for run in runs)
    figure = f"{mutants:,} of {seeds} seeds: {mutants - loaded:,} refused by an error of ours, {loaded:,} loaded"
    return [("mutants", figure, f"{runs[0]['date'][:10]} to {runs[-1]['date'][:10]}, Python {runs[-1]['python']}")]


def kills(run: Run) -> list[tuple[str, str, str]]:
    figure = (
        f"{run['survived']} of {run['rounds']} servers gone within 5 s (the slowest in {run['slowest_seconds']:.2f} s) "
        f"and served again on their port; {run['served_after']:,} requests after the restarts"
    )
    return [("processes killed with SIGKILL, at load and under traffic", figure, where(run))]


def load(run: Run) -> list[tuple[str, str, str]]:
    rows = []
    for name in ("mixed", "stock"):
        figure = f"{run[f'{name}_served']:,} served, {run[f'{name}_errors']} errors"
        figure += f"; p50 {run[f'{name}_p50_ms']:g} ms, p99 {run[f'{name}_p99_ms']:g} ms"
        rows.append((f"requests at {run['rate']:g} a second, {name}", figure, where(run)))
    return rows


def soak(run: Run) -> list[tuple[str, str, str]]:
    rows = []
    for name in ("mixed", "stock"):
        sizes = [kinds["rss"][run["warm_up"] :] for kinds in run[f"{name}_series"].values()]
        after = [sum(minute) for minute in zip(*sizes, strict=True)]
        figure = (
            f"{run['minutes']:g} minutes, {run[f'{name}_served']:,} served, {run[f'{name}_errors']} errors; memory of "
            f"all processes {run[f'{name}_mib']:,} MiB, growth after {run['warm_up']} minutes "
            f"{run[f'{name}_growth_percent']:g} %, in its highest minute {100 * (max(after) / after[0] - 1):.3f} %"
        )
        rows.append((f"soak at {run['rate']:g} requests a second, {name}", figure, where(run)))
    return rows


def where(run: Run) -> str:
    versions = [f"Python {run['python']}", *(f"{name} {run[name]}" for name in ("sglang", "torch") if name in run)]
    return f"{run['date'][:16].replace('T', ' ')} UTC, {', '.join(versions)}" + (", -O" if run.get("optimized") else "")


ROWS = {"attacks": attacks, "kills": kills, "load": load, "soak": soak}
INTRODUCTION = """\
Made by `scripts/reliability/report.py` from [reliability.jsonl](reliability.jsonl), to which the runs append: the
latest of each kind, on two cores that other work shared. What is tried is in `attacks/`,
`tests/fuzz`, and `scripts/reliability`."""
LIMITS = """\
## What is not bounded by 64 MiB

The attacks' headers are short. A safetensors header may have 100 MB by its format's own rule, and is read whole, broken
or not: one of 99 MB that names 900,000 tensors of modules took 465 MiB at its peak. Names without a module ("weight"
instead of "norm.weight") are looked at one by one: 1.75 million of them took 2.5 GiB and a minute. Who opens files of
others has to bound the process where that is too much.

## What grows in a soak

- SGLang's cache of prefixes, until it is full: at 3 requests a second both servers grow by 0.8 MiB a minute.
- Code that oneDNN makes for each shape of a 16-bit product, about 0.65 MB a shape, and keeps for the latest 1024 of
  them. Every batch size that occurs for the first time takes some: 699 requests in batches of 1 to 24 took 186 MiB of
  stock SGLang and 123 MiB of the mix. Products alone, of 6,000 shapes, ended at 908 MiB, and with
  `LRU_CACHE_CAPACITY=64 ONEDNN_PRIMITIVE_CACHE_CAPACITY=64` at 63 MiB; such a mix grew by 1.4 MiB from the 700th to
  the 1,383rd request. The soak sets both for both servers, and its warm-up begins with such batches: what grows after
  it is something else."""
FAULTS_INTRODUCTION = """\
`scripts/reliability/faults.py` changes one line of a copy of the package and runs the tests that are named; six more
faults, of weights in memory, are in `tests/engine/test_faults.py`."""

if __name__ == "__main__":
    sys.exit(main())
