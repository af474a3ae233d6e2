"""`sglang-mixed sensitivity MAP`: the error that each source brings to each part of the model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress as Bar

from ..errors import SensitivityError
from ..plan.candidates import Candidates, find_candidates
from ..plan.fold import split_name
from ..search import weighted_errors
from ..sensitivity import Sensitivity, write_sensitivity
from ..sensitivity.progress import Progress
from ..sensitivity.weights import measure_weights, wanted
from .experts import gather
from .sources import read_sources
from .tables import number_table


def run(
    given: Sequence[str],
    text: Path | None = None,
    output: Path | None = None,
    *,
    tokens: int = 4096,
    window: int = 256,
    split: bool = False,
    experts: str | None = None,
    allow_different_base: bool = False,
) -> dict[str, Any]:
    """Measure, with a progress bar on stderr; with `output`, go on with what was saved there.

    The errors as JSON values, and `kinds`: their sums by kind of module and source, weighted by use.
    """
    described = read_sources(given, allow_different_base=allow_different_base)
    traffic = gather([experts]) if experts else None
    candidates = find_candidates(described, split=split)
    facts: dict[str, Any] = {"sources": {name: one.digest for name, one in candidates.checkpoints.items()}}
    windows = None
    if text is not None:
        windows = read_windows(text, candidates.checkpoints[candidates.base].path, tokens, window)
        facts |= {"text": _digest(text), "tokens": windows.numel(), "window": window, "split": split}
    with Progress(output.with_name(f"{output.name}.partial") if output else None, facts) as progress:
        found = _measure(candidates, progress, windows, facts)
        if output is not None:
            write_sensitivity(output, found)
            progress.finish()
    return {**found.to_json(), "kinds": by_kind(candidates, weighted_errors(candidates, found, traffic))}


def _measure(
    candidates: Candidates, progress: Progress, windows: torch.Tensor | None, facts: dict[str, Any]
) -> Sensitivity:
    with Bar(console=Console(stderr=True)) as bar:
        task = bar.add_task("sensitivity", total=len(wanted(candidates) if windows is None else candidates.units))
        if windows is None:
            return measure_weights(candidates, progress, lambda modules: bar.advance(task, modules))
        from ..sensitivity.divergence import measure_divergence

        details = {"text": facts["text"]}
        return measure_divergence(candidates, windows, progress, lambda one: bar.advance(task, one), details)


def by_kind(candidates: Candidates, errors: dict[tuple[str, str], float]) -> dict[str, dict[str, float]]:
    """Kind of unit -> source -> the sum of its units' errors."""
    kinds: dict[str, dict[str, float]] = {}
    for (name, source), error in errors.items():
        if source != candidates.base:
            sums = kinds.setdefault(split_name(name)[0], {})
            sums[source] = sums.get(source, 0.0) + error
    return kinds


def read_windows(text: Path, model: Path, tokens: int, length: int) -> torch.Tensor:
    """Token ids [count, length] of the first `tokens` tokens of a text. Raises SensitivityError for less than one."""
    from transformers import AutoTokenizer

    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SensitivityError(f"cannot be read: {error}", file=text, remedy="give a text in UTF-8") from error
    ids = AutoTokenizer.from_pretrained(str(model))(content, verbose=False)["input_ids"][:tokens]
    if len(ids) < length:
        raise SensitivityError(
            f"a text of {len(ids)} tokens",
            file=text,
            rule=f"at least one window of {length}",
            remedy="give a longer text",
        )
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def _digest(text: Path) -> str:
    return hashlib.sha256(text.read_bytes()).hexdigest()


def render(report: dict[str, Any], output: Path | None) -> None:
    """Print the sums by kind of module."""
    sources = list(report["errors"])
    table = number_table(f"error ({report['measure']})", "part", *sources)
    for kind, sums in report["kinds"].items():
        table.add_row(kind, *(f"{sums[source]:.3g}" if source in sums else "" for source in sources))
    totals = [sum(sums.get(source, 0.0) for sums in report["kinds"].values()) for source in sources]
    table.add_section()
    table.add_row("all", *(f"{total:.3g}" for total in totals))
    console = Console()
    console.print(table)
    if output:
        console.print(f"written: {output}", highlight=False)
