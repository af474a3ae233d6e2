"""What every client of a running server needs."""

from __future__ import annotations

from typing import Any


def authorization(api_key: str | None) -> dict[str, str]:
    """The header that a server with a key wants."""
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def every_rank(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Of an answer of `GET /mixed_precision` the reports of all ranks: tensor-parallel within data-parallel ones."""
    groups = [report, *report.get("data_parallel_ranks", [])]
    return [rank for group in groups for rank in group.get("tensor_parallel_ranks", [group])]
