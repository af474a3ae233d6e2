"""`sglang-mixed proof URL`: what a running server says of its weights."""

from __future__ import annotations

import json
import time
import urllib.request
from typing import Any
from urllib.error import URLError

from rich.console import Console
from rich.table import Table

from ..errors import EngineError, ProofError


def fetch_proof(url: str, seconds: float = 600) -> dict[str, Any]:
    """The report of `GET /mixed_precision`, once the server has compared memory and files.

    Raises EngineError if the server does not answer, ProofError if the comparison failed.
    """
    deadline = time.monotonic() + seconds
    while True:
        report = _get(f"{url.rstrip('/')}/mixed_precision")
        verification = report["verification"]
        if verification["state"] == "verified":
            return report
        if verification["state"] == "failed" or time.monotonic() > deadline:
            raise ProofError(f"the server's proof is {verification['state']}", file=url, remedy="see the server's log")
        time.sleep(0.2)


def _get(url: str) -> dict[str, Any]:
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            report: dict[str, Any] = json.load(response)
            return report
    except (URLError, ValueError) as error:
        raise EngineError(
            f"no proof at this address: {error}",
            file=url,
            rule="GET /mixed_precision is served by SGLang started with --enable-mixed-precision",
            remedy="check the address, and that the server was started with the map",
        ) from error


def print_proof(report: dict[str, Any], console: Console) -> None:
    """Totals by format, and the verdict."""
    table = Table("format", "modules", "MiB", "MiB in 16 bits", title="weights in memory")
    for column in table.columns[1:]:
        column.justify = "right"
    for label, total in report["by_format"].items():
        table.add_row(
            label, f"{total['modules']:,}", *(f"{total[key] / 2**20:,.2f}" for key in ("bytes", "bf16_bytes"))
        )
    console.print(table)
    verification = report["verification"]
    console.print(
        f"{report['weight_bytes']:,} bytes in memory, {report['planned_bytes']:,} planned, "
        f"{report['bf16_bytes']:,} in 16 bits (ratio {report['compression_ratio']:.2f}); "
        f"{report['bytes_read']:,} bytes read"
    )
    console.print(
        f"{verification['verified']:,} of {verification['modules']:,} modules in memory have the SHA-256 of their files"
    )
