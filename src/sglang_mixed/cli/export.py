"""`sglang-mixed export MAP OUT`: the mix as one checkpoint folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import MapError
from ..export import export
from ..export.shards import lay_out
from ..plan import make_plan
from ..progress import progress
from .check import human

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(I?)B?", re.IGNORECASE)


def run(
    map_path: Path,
    folder: Path,
    max_shard_size: str = "5GB",
    model_path: str | None = None,
    *,
    allow_different_base: bool = False,
) -> dict[str, Any]:
    """Export, with a progress bar on stderr; what was written, as JSON values."""
    max_bytes = parse_size(max_shard_size)
    plan = make_plan(map_path, base=model_path, allow_different_base=allow_different_base)
    shards = lay_out(plan, max_bytes)
    total = sum(shard.nbytes for shard in shards)
    with progress("export", total) as advance:
        export(plan, folder, max_bytes, advance)
    return {
        "folder": str(folder),
        "shards": [shard.name for shard in shards],
        "bytes": total,
        "tensors": sum(len(shard.pieces) for shard in shards),
        "modules": len(plan.modules),
        "sources": {name: str(path) for name, path in plan.sources.items()},
        "fingerprint": plan.fingerprint,
        "warnings": list(plan.warnings),
    }


def render(report: dict[str, Any]) -> None:
    """Print what was written, and how to serve it."""
    console = Console(soft_wrap=True, highlight=False)
    for warning in report["warnings"]:
        console.print(f"warning: {warning}", style="yellow", markup=False)
    files = "1 file" if len(report["shards"]) == 1 else f"{len(report['shards'])} files"
    console.print(
        f"{report['tensors']:,} tensors of {report['modules']:,} modules from {len(report['sources'])} sources: "
        f"{human(report['bytes'])} in {files}",
        markup=False,
    )
    console.print(f"serve it: sglang serve --model-path {report['folder']}", markup=False)


def parse_size(text: str) -> int:
    """Bytes of `5GB`, `500MB`, `2GiB`: powers of 1000, of 1024 with an `i`. Raises MapError for anything else."""
    found = _SIZE.fullmatch(text.strip())
    size = (
        0 if found is None else float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " ")
    )
    if size < 1:
        raise MapError(f"{text!r} is no size of a file", rule="a number and a unit, e.g. 5GB or 500MiB")
    return int(size)
