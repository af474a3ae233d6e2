"""The comparison as a picture: where the predictions part, and the two servers beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UnsupportedError


def draw(path: Path, names: Sequence[str], report: Mapping[str, Any]) -> None:
    """Write a picture, in the format that the file's ending names. Raises UnsupportedError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError(
            "matplotlib is not installed", rule="it draws the pictures", remedy="pip install 'sglang-mixed[pictures]'"
        ) from error
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, *bars = figure.subplots(1, 3, width_ratios=(3, 1, 1))
    windows = np.sort(report["divergence_by_window"])
    left.plot(windows, (np.arange(len(windows)) + 1) / len(windows), drawstyle="steps-post", color="0.2")
    left.axvline(report["divergence"]["value"], color="C3", label=f"mean {report['divergence']['value']:.4g}")
    left.set_xlabel(f"KL({names[0]} || {names[1]}), nats a token")
    left.set_ylabel("share of windows")
    left.legend(frameon=False)
    for axes, key, label in zip(bars, ("perplexity", "tokens_per_second"), ("perplexity", "tokens/s"), strict=True):
        values = [one["value"] for one in report[key]]
        errors = [
            [one["value"] - one["low"] for one in report[key]],
            [one["high"] - one["value"] for one in report[key]],
        ]
        axes.bar(names, values, yerr=errors, color=("C0", "C1"), capsize=4)
        axes.set_title(label)
        axes.tick_params("x", rotation=20)
    figure.savefig(path, dpi=120)
