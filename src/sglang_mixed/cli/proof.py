"""`sglang-mixed proof URL`: what a running server says of its weights."""

from __future__ import annotations

import json
import time
import urllib.request
from typing import Any
from urllib.error import URLError

from rich.console import Console
from rich.table import Table

from ..client import authorization, every_rank
from ..errors import EngineError, ProofError


def fetch_proof(url: str, seconds: float = 600, api_key: str | None = None) -> dict[str, Any]:
    """The report of `GET /mixed_precision`, once every rank of the server has compared memory and files.

    Raises EngineError if the server does not answer, ProofError if a comparison failed.
    """
    deadline = time.monotonic() + seconds
    while True:
        report = _get(f"{url.rstrip('/')}/mixed_precision", api_key)
        states = {rank["verification"]["state"] for rank in every_rank(report)}
        if states == {"verified"}:
            return report
        if "failed" in states or time.monotonic() > deadline:
            state = "failed" if "failed" in states else "running"
            raise ProofError(f"the server's proof is {state}", file=url, remedy="see the server's log")
        time.sleep(0.2)


def _get(url: str, api_key: str | None) -> dict[str, Any]:
    try:
        request = urllib.request.Request(url, headers=authorization(api_key))
        with urllib.request.urlopen(request, timeout=60) as response:
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
    """Totals by format, and every rank's verdict."""
    ranks = every_rank(report)
    table = Table(
        "format",
        "modules",
        "MiB",
        "MiB in 16 bits",
        title="weights in memory" + (" of rank 0" if len(ranks) > 1 else ""),
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for label, total in report["by_format"].items():
        table.add_row(
            label, f"{total['modules']:,}", *(f"{total[key] / 2**20:,.2f}" for key in ("bytes", "bf16_bytes"))
        )
    console.print(table)
    for number, rank in enumerate(ranks):
        verification = rank["verification"]
        console.print(
            (f"rank {number}: " if len(ranks) > 1 else "")
            + f"{rank['weight_bytes']:,} bytes in memory, {rank['planned_bytes']:,} planned, "
            f"{rank['bf16_bytes']:,} in 16 bits (ratio {rank['compression_ratio']:.2f}); "
            f"{rank['bytes_read']:,} bytes read"
        )
        console.print(
            f"{verification['verified']:,} of {verification['modules']:,} modules in memory "
            "have the SHA-256 of their files"
        )
