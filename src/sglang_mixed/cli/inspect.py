"""`sglang-mixed inspect PATH...`: what checkpoints are, from their headers alone."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from ..checkpoint import open_checkpoint
from ..checkpoint.pause import collector_paused
from ..config import locate
from ..plan import inspection
from ..plan.oddities import oddities, quantization
from .check import human

#: (row of the summary, key of a report, how it is shown).
_SUMMARY = (
    ("model", "model", str),
    ("quantization", "quantization", lambda method: method or "none"),
    ("parameters", "parameters", "{:,}".format),
    ("modules", "modules", "{:,}".format),
    ("tensors", "tensors", "{:,}".format),
    ("files", "files", "{:,}".format),
    ("on disk", "file_bytes", human),
    ("in memory", "resident_bytes", human),
)


@collector_paused()
def describe(text: str) -> dict[str, Any]:
    """Everything the tables show of one checkpoint (a folder or a cached hub name), as JSON values; bytes are exact."""
    checkpoint = open_checkpoint(locate(text, Path.cwd()))
    kinds = inspection.kinds(checkpoint)
    rows = inspection.rows(kinds)
    return {
        "path": str(checkpoint.path),
        "model": _model(checkpoint.config),
        "quantization": quantization(checkpoint),
        "modules": len(checkpoint.modules),
        "tensors": sum(len(kind.tensors) * len(kind.names) for kind in kinds),
        "files": len(checkpoint.files),
        "parameters": sum(row.parameters for row in rows if row.is_loaded),
        "file_bytes": sum(row.file_bytes for row in rows),
        "resident_bytes": sum(row.resident_bytes for row in rows),
        "rows": [asdict(row) for row in rows],
        "oddities": oddities(checkpoint, kinds),
    }


def describe_all(paths: Iterable[str]) -> list[dict[str, Any]]:
    """As `describe`, of each; a progress bar stands on stderr if that is a terminal."""
    console = Console(stderr=True)
    opened = track([*paths], "reading headers", console=console, transient=True, disable=not console.is_terminal)
    return [describe(path) for path in opened]


def _model(config: dict[str, Any]) -> str:
    return ", ".join(config.get("architectures") or ()) or str(config.get("model_type", "unknown"))


def render(reports: list[dict[str, Any]], console: Console | None = None) -> None:
    """Print the checkpoints side by side, then each one's modules and oddities."""
    console = console or (Console() if sys.stdout.isatty() else Console(width=180))
    names = _distinct([Path(report["path"]) for report in reports])
    summary = Table(box=None, title_justify="left", show_header=len(reports) > 1)
    summary.add_column()
    for name in names:
        summary.add_column(name, justify="right", overflow="fold")
    for label, key, show in _SUMMARY:
        summary.add_row(label, *(Text(show(report[key])) for report in reports))
    console.print(summary)
    for name, report in zip(names, reports, strict=True):
        console.print(_modules(name, report))
        for oddity in report["oddities"]:
            console.print(Text(f"note: {oddity}", style="yellow"))


def _modules(title: str, report: dict[str, Any]) -> Table:
    table = Table(title=title, title_justify="left", box=None)
    for name in ("modules", "format"):
        table.add_column(name, overflow="fold")
    for name in ("count", "parameters", "on disk", "in memory"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in report["rows"]:
        sizes = human(row["file_bytes"]), human(row["resident_bytes"]) if row["is_loaded"] else "not loaded"
        table.add_row(Text(row["modules"]), row["format"], f"{row['count']:,}", f"{row['parameters']:,}", *sizes)
    return table


def _distinct(paths: list[Path]) -> list[str]:
    """The paths' last parts, as many as tell them apart."""
    for length in range(1, max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]
