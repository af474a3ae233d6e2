"""`sglang-mixed check MAP`: the plan as a table."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..plan import Rank, make_plan
from ..plan.fold import fold
from ..plan.originals import compare_with_originals
from ..plan.values import verify_values as read_values


def describe(
    map_path: Path,
    model_path: str | None = None,
    *,
    allow_different_base: bool = False,
    tp: int = 1,
    ep: int = 1,
    verify_values: bool = False,
) -> dict[str, Any]:
    """Everything the table shows, as JSON values; bytes are exact. `verify_values` reads all weights."""
    plan = make_plan(map_path, base=model_path, allow_different_base=allow_different_base)
    for checkpoint in plan.checkpoints.values():
        checkpoint.check_index()
    verified = read_values(plan) if verify_values else 0
    compared = compare_with_originals(plan) if verify_values and not allow_different_base else 0
    ranks = [plan.rank(Rank(tp, ep, number)) for number in range(tp)]
    torn = fold(dict.fromkeys(name for rank in ranks for name in rank.torn))
    return {
        "map": str(plan.map.path),
        "base": plan.base,
        "sources": {name: str(path) for name, path in plan.sources.items()},
        "rows": [asdict(row) for row in plan.rows()],
        "modules": len(plan.modules),
        "weight_bytes": plan.weight_bytes(),
        "rank_bytes": max(rank.weight_bytes for rank in ranks),
        "ranks_bytes": [rank.weight_bytes for rank in ranks],
        "torn": torn,
        "tp": tp,
        "ep": ep,
        "file_bytes": plan.file_bytes,
        "verified_bytes": verified,
        "compared_modules": compared,
        "bf16_bytes": plan.bf16_bytes,
        "warnings": list(plan.warnings),
        "fingerprint": plan.fingerprint,
    }


def render(report: dict[str, Any], console: Console | None = None) -> None:
    """Print the report: what comes from where, totals, warnings."""
    # A pipe has no width: lines as long as they need to be.
    console = console or (Console() if sys.stdout.isatty() else Console(width=180))
    table = Table(title=f"{Path(report['map']).name}: {report['modules']} modules", title_justify="left", box=None)
    for name in ("modules", "source", "format"):
        table.add_column(name, overflow="fold")
    for name in ("count", "memory", "16 bits"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in report["rows"]:
        sizes = human(row["nbytes"]), human(row["bf16_bytes"])
        table.add_row(Text(row["modules"]), Text(row["source"]), row["format"], str(row["count"]), *sizes)
    table.add_section()
    table.add_row("all", "", "", str(report["modules"]), human(report["weight_bytes"]), human(report["bf16_bytes"]))
    console.print(table)
    if report["tp"] > 1:
        console.print(
            f"the fullest of {report['tp']} ranks (ep {report['ep']}): {human(report['rank_bytes'])}, "
            f"all together: {human(sum(report['ranks_bytes']))}",
            highlight=False,
        )
    console.print(f"to read from disk: {human(report['file_bytes'])}", highlight=False)
    if report["verified_bytes"]:
        console.print(
            f"values verified: {human(report['verified_bytes'])}; modules compared with their 16-bit originals: "
            f"{report['compared_modules']:,}",
            highlight=False,
        )
    warnings = list(report["warnings"])
    if torn := report["torn"]:
        more = f", and {len(torn) - 3} more" if len(torn) > 3 else ""
        warnings.append(
            f"cut inside a block, group or word ({', '.join(torn[:3])}{more}): each rank holds whole ones; "
            "on a GPU linear layers cut like that run on our own kernel"
        )
    for warning in warnings:
        console.print(Text(f"warning: {warning}", style="yellow"))
    console.print("the map is sound", style="green")


def human(nbytes: int) -> str:
    """Bytes in the largest binary unit that leaves a whole digit."""
    size, unit = float(nbytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
