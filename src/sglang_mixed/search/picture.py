"""Error against bytes: the frontier, the mix on it, and what one source alone would give."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import UnsupportedError
from .mix import Mix, Point


def draw(path: Path, mix: Mix, frontier: Sequence[Point], uniform: Sequence[Point], measure: str) -> None:
    """Write a picture, in the format that the file's ending names. Raises UnsupportedError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError(
            "matplotlib is not installed", rule="it draws the pictures", remedy="pip install 'sglang-mixed[plan]'"
        ) from error
    largest = max(point.rank_bytes for point in (*frontier, *uniform))
    unit, name = next((size, name) for size, name in ((2**30, "GiB"), (2**20, "MiB"), (1, "B")) if largest > size)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    shown = [point for point in frontier if point.error > 0]
    axes.plot(
        [one.rank_bytes / unit for one in shown], [one.error for one in shown], "-", color="0.5", label="frontier"
    )
    for number, point in enumerate(uniform):
        if point.error > 0:
            axes.plot(point.rank_bytes / unit, point.error, "o", color=f"C{number}", label=f"all {point.name}")
    axes.plot(mix.rank_bytes / unit, mix.error, "*", color="black", markersize=14, label="this plan")
    axes.set_yscale("log")
    axes.set_xlabel(f"weights of the fullest rank, {name}")
    axes.set_ylabel(f"error ({measure})")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
