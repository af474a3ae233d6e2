"""The page's pictures as a PNG, drawn with matplotlib (`pip install sglang-mixed[pictures]`); no display is needed."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ExpertExportError
from .balance import gini, top_share
from .colors import STEPS, letter, ramp
from .counts import Counts
from .export import ExpertExport
from .formats import UNKNOWN, ExpertFormats

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: What `GET /mixed_precision` calls the two ways to divide memory, and what the picture calls them.
_DIVISIONS = {"by_format": "by format", "by_module_kind": "by kind of module"}
_QUIET, _BAR, _GHOST, _SECOND = "#625f58", "#2f6f8f", "#e0dfda", "#a34a1f"
Memory = Mapping[str, Mapping[str, Mapping[str, int]]]


def draw(export: ExpertExport, memory: Memory | None = None, title: str = "Tokens per expert") -> bytes:
    """PNG of the heat map and the load balance; with `memory` ({by_format, by_module_kind}) also what weights take.

    Raises ExpertExportError without matplotlib, or without a single expert.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ExpertExportError(
            "pictures need matplotlib", remedy="pip install 'sglang-mixed[pictures]', or open the server's page"
        ) from error
    layers, counts = export.grid()
    if not counts.size:
        raise ExpertExportError("no expert to draw", rule="an export holds at least one expert")
    heights = [min(9.0, max(1.6, 0.13 * len(layers) + 0.6)), 2.2] + ([2.4] if memory else [])
    figure = Figure(figsize=(12, sum(heights) + 1.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=12)
    rows = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    _heat_map(rows[0].subplots(), layers, counts, export.formats)
    _balance(rows[1].subplots(), layers, counts)
    if memory:
        axes = rows[2].subplots(1, len(_DIVISIONS))
        for axis, (key, name) in zip(axes, _DIVISIONS.items(), strict=True):
            _bars(axis, f"weights in memory, {name}", memory[key])
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def _heat_map(axes: Axes, layers: tuple[int, ...], counts: Counts, formats: ExpertFormats | None) -> None:
    from matplotlib.patches import Patch

    even = np.maximum(counts.mean(axis=1, keepdims=True), 1e-9)
    multiples = counts / even
    limit = max(1.0, float(multiples.max()))
    # An even share has the middle of the ramp, so that hot and cold differ in balanced layers, too.
    places = np.interp(multiples, (0, 1, max(limit, 1 + 1e-9)), (0, 0.5, 1))
    steps = np.round((STEPS - 1) * places).astype(int)
    cells = formats.cells if formats else np.full(counts.shape, UNKNOWN)
    numbers = range(UNKNOWN, len(formats.labels) if formats else 0)
    axes.imshow(np.stack([ramp(number) for number in numbers])[cells - UNKNOWN, steps], aspect="auto")
    _name_layers(axes, layers)
    axes.set_xlabel(f"expert (the strongest cell: {limit:.1f} x an even share of its layer's tokens)", color=_QUIET)
    if formats:
        handles = [
            Patch(color=ramp(number)[STEPS // 2], label=f"{letter(number)}  {label}")
            for number, label in enumerate(formats.labels)
        ]
        axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, fontsize=8)
    if formats and max(counts.shape) <= 32:
        for row, expert in np.argwhere(cells != UNKNOWN):
            color = "white" if steps[row, expert] > STEPS // 2 else "black"
            axes.text(expert, row, letter(cells[row, expert]), color=color, ha="center", va="center", fontsize=8)


def _name_layers(axes: Axes, layers: tuple[int, ...]) -> None:
    every = -(-len(layers) // 24)
    axes.set_yticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]], fontsize=8)
    axes.set_ylabel("layer", color=_QUIET)
    axes.tick_params(length=0, labelsize=8, colors=_QUIET)
    axes.spines[:].set_visible(False)


def _balance(axes: Axes, layers: tuple[int, ...], counts: Counts) -> None:
    x = [str(layer) for layer in layers]
    axes.plot(x, gini(counts), "o-", color=_BAR, markersize=3, label="Gini (0 is even)")
    axes.plot(x, top_share(counts), "s--", color=_SECOND, markersize=3, label="share of the hottest 10 %")
    axes.set_ylim(0, 1)
    axes.set_xticks(range(0, len(x), -(-len(x) // 32)))
    axes.set_xlabel("layer", color=_QUIET)
    axes.grid(axis="y", color=_GHOST)
    axes.tick_params(length=0, labelsize=8, colors=_QUIET)
    axes.spines[:].set_visible(False)
    axes.legend(loc="upper right", ncols=2, frameon=False, fontsize=8)


def _bars(axes: Axes, title: str, totals: Mapping[str, Mapping[str, int]]) -> None:
    rows: list[tuple[str, Any]] = sorted(totals.items(), key=lambda item: item[1]["bf16_bytes"])
    names, mib = [name for name, _ in rows], 2**20
    axes.barh(names, [one["bf16_bytes"] / mib for _, one in rows], color=_GHOST, label="in 16 bits")
    bars = axes.barh(names, [one["bytes"] / mib for _, one in rows], color=_BAR, height=0.5, label="in memory")
    axes.bar_label(
        bars, [f" {one['bytes'] / mib:,.2f} of {one['bf16_bytes'] / mib:,.2f} MiB" for _, one in rows], fontsize=8
    )
    axes.set_title(title, loc="left", fontsize=9, color=_QUIET)
    axes.set_xticks([])
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)
    axes.margins(x=0.25)
