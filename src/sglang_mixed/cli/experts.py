"""`sglang-mixed experts URL|FILE...`: what the experts of servers and exports do, as tables and files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..client import authorization, every_rank
from ..errors import EngineError, ExpertCountsError
from ..experts import ExpertExport, merge, read_export, write_export
from ..experts.balance import effective_experts, gini, top_share
from ..experts.files import write_csv, write_whole
from ..experts.statistics import top_experts

_ROUTE = "/mixed_precision/experts"


def is_url(source: str) -> bool:
    """Whether a source is a server's address; everything else is a file."""
    return source.startswith(("http://", "https://"))


def gather(sources: Sequence[str], *, reset: bool = False, api_key: str | None = None) -> ExpertExport:
    """The sum over servers and files. `reset` clears the servers' counts: the sum then has what was cleared.

    Raises EngineError for a server without counts, ExpertExportError for a file, ExpertCountsError for several models.
    """
    if reset and not all(map(is_url, sources)):
        raise ExpertCountsError("a file cannot be reset", rule="--reset is for a running server", remedy="leave it out")
    return merge([_fetch(source, reset, api_key) if is_url(source) else read_export(source) for source in sources])


def memory_of(url: str, api_key: str | None = None) -> dict[str, dict[str, dict[str, int]]]:
    """What a server's weights take, by format and by kind of module, all ranks together. Raises EngineError."""
    ranks = every_rank(_ask(url, "/mixed_precision?modules=false", "GET", api_key))
    divisions: dict[str, dict[str, dict[str, int]]] = {"by_format": {}, "by_module_kind": {}}
    for rank in ranks:
        for key, totals in divisions.items():
            for label, one in rank[key].items():
                total = totals.setdefault(label, {"bytes": 0, "bf16_bytes": 0})
                for name in total:
                    total[name] += one[name]
    return divisions


def describe(export: ExpertExport, top: int, layer: int | None = None) -> dict[str, Any]:
    """What the tables show, as JSON values: the `top` most active experts, and the `top` most uneven layers.

    Raises ExpertCountsError for a layer that has no experts.
    """
    layers, totals = export.grid()
    if layer is not None and layer not in layers:
        raise ExpertCountsError(
            f"layer {layer} has no experts",
            rule="a layer with experts",
            remedy=f"one of: {', '.join(map(str, layers))}",
        )
    rows = {number: row for row, number in enumerate(layers)}
    chosen = [one for one in export.experts if one.activation_count and layer in (None, one.layer_id)]
    balance = zip(layers, totals.sum(axis=1), gini(totals), top_share(totals), effective_experts(totals), strict=True)
    uneven = sorted((row for row in balance if layer in (None, row[0]) and row[1]), key=lambda row: (-row[2], row[0]))
    return {
        "since": export.since,
        "until": export.until,
        "experts": totals.shape[1],
        "activations": int((totals if layer is None else totals[rows[layer]]).sum()),
        "tokens": int(np.max(export.counts.tokens, initial=0)) if export.counts else None,
        "top_experts": [
            one | _further(export, rows[one["layer_id"]], one["expert_id"], totals) for one in top_experts(chosen, top)
        ],
        "uneven_layers": [
            {
                "layer_id": number,
                "activations": int(total),
                "gini": float(unevenness),
                "top_10_percent": float(share),
                "effective_experts": float(effective),
            }
            for number, total, unevenness, share, effective in uneven[:top]
        ],
    }


def _further(export: ExpertExport, row: int, expert: int, totals: Any) -> dict[str, Any]:
    counts, formats = export.counts, export.formats
    return {
        "share": float(totals[row, expert] / totals[row].sum()),
        "prefill": int(counts.prefill[row, expert]) if counts else None,
        "decode": int(counts.decode[row, expert]) if counts else None,
        "mean_weight": float(counts.weights[row, expert] / totals[row, expert]) if counts else None,
        "format": formats.label(row, expert) if formats else None,
    }


def render(report: Mapping[str, Any]) -> None:
    """Print both tables."""
    console = Console()
    if not report["activations"]:
        console.print("no expert was active yet")
        return
    heads = "layer", "expert", "format", "activations", "share", "prefill", "decode", "weight"
    table = _table("most active experts", heads)
    for one in report["top_experts"]:
        weight = "" if one["mean_weight"] is None else f"{one['mean_weight']:.3f}"
        phases = ["" if one[phase] is None else f"{one[phase]:,}" for phase in ("prefill", "decode")]
        numbers = f"{one['activation_count']:,}", f"{one['share']:.1%}", *phases, weight
        table.add_row(str(one["layer_id"]), str(one["expert_id"]), one["format"] or "", *numbers)
    console.print(table)
    effective = f"effective of {report['experts']}"
    table = _table("most uneven layers", ("layer", "activations", "Gini", "hottest 10 %", effective))
    for row in report["uneven_layers"]:
        shares = f"{row['gini']:.2f}", f"{row['top_10_percent']:.1%}", f"{row['effective_experts']:.1f}"
        table.add_row(str(row["layer_id"]), f"{row['activations']:,}", *shares)
    console.print(table)
    tokens = "" if report["tokens"] is None else f" of {report['tokens']:,} tokens"
    console.print(f"{report['activations']:,} activations{tokens}", highlight=False)


def _table(title: str, heads: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for head in heads:
        is_text = head == "format"
        table.add_column(head, justify="left" if is_text else "right", no_wrap=not is_text)
    return table


def _fetch(url: str, reset: bool, api_key: str | None) -> ExpertExport:
    path, method = (f"{_ROUTE}/reset", "POST") if reset else (f"{_ROUTE}.json", "GET")
    try:
        return ExpertExport.from_json(_ask(url, path, method, api_key))
    except ExpertCountsError as error:
        raise EngineError(f"no export from this server: {error.what}", file=url, rule=error.rule) from error


def _ask(url: str, path: str, method: str, api_key: str | None) -> Any:
    request = Request(url.rstrip("/") + path, headers=authorization(api_key), method=method)
    try:
        with urlopen(request, timeout=60) as answer:
            return json.load(answer)
    except HTTPError as error:
        with error:
            raise _refusal(error, url) from error
    except (URLError, OSError, ValueError) as error:
        raise EngineError(
            f"no expert statistics at this address: {getattr(error, 'reason', error)}",
            file=url,
            remedy="check the address, and that the server runs",
        ) from error


def _refusal(error: HTTPError, url: str) -> EngineError:
    if error.code in (401, 403):
        return EngineError("the server asks for an API key", file=url, remedy="give the right one with --api-key")
    try:
        return EngineError(json.load(error)["error"], file=url)
    except (ValueError, KeyError, TypeError, OSError):
        return EngineError(
            f"no expert statistics at this address: HTTP {error.code}",
            file=url,
            rule=f"GET {_ROUTE} is served by SGLang started with --enable-mixed-precision",
            remedy="check the address, and that the server was started with the map",
        )


def write(
    statistics: ExpertExport,
    sources: Sequence[str],
    *,
    csv: Path | None = None,
    export: Path | None = None,
    png: Path | None = None,
    api_key: str | None = None,
) -> None:
    """Write the files that were asked for; memory is in the picture of a single server. Raises ExpertExportError."""
    if export:
        write_export(export, statistics)
    if csv:
        write_csv(csv, statistics)
    if png:
        from ..experts.picture import draw

        memory = memory_of(sources[0], api_key) if len(sources) == 1 and is_url(sources[0]) else None
        write_whole(png, draw(statistics, memory, f"Tokens per expert: {', '.join(sources)}"))
