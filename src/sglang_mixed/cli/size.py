"""`sglang-mixed size MAP`: what every rank will hold and read, and how many tokens' cache fits beside it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..checkpoint.pause import collector_paused
from ..errors import UnsupportedError
from ..memory import rank_memory
from ..plan import Plan, Rank, make_plan
from ..plan.families import text_config
from ..plan.kv_cache import cache_item_bytes, default_mem_fraction, kv_cache
from .check import human


@collector_paused()
def describe(
    map_path: Path,
    model_path: str | None = None,
    *,
    tp: int = 1,
    ep: int = 1,
    gpu_memory: float = 80,
    mem_fraction_static: float | None = None,
    kv_cache_dtype: str = "auto",
    allow_different_base: bool = False,
) -> dict[str, Any]:
    """Everything the tables show, as JSON values; `gpu_memory` in GiB. Bytes of weights and reads are exact."""
    plan = make_plan(map_path, base=model_path, allow_different_base=allow_different_base)
    ranks = []
    for number in range(tp):
        rank = plan.rank(Rank(tp, ep, number))
        ranks.append({"number": number, **rank_memory(rank), "read_bytes": rank.read_bytes})
    fullest = max(ranks, key=lambda rank: int(rank["weight_bytes"]))
    capacity = int(gpu_memory * 2**30)
    is_latent = bool(text_config(plan.checkpoints[plan.base].config).get("kv_lora_rank"))
    fraction = default_mem_fraction(capacity, tp, is_latent) if mem_fraction_static is None else mem_fraction_static
    left = int(capacity * fraction) - fullest["weight_bytes"]
    return {
        "map": str(plan.map.path),
        "base": plan.base,
        "tp": tp,
        "ep": ep,
        "modules": len(plan.modules),
        "weight_bytes": fullest["weight_bytes"],
        "fullest_rank": fullest["number"],
        "ranks": ranks,
        "gpu_memory_bytes": capacity,
        "mem_fraction_static": fraction,
        "fits": left > 0,
        "kv_cache": _kv_cache(plan, tp, kv_cache_dtype, max(left, 0)),
        "warnings": list(plan.warnings),
        "fingerprint": plan.fingerprint,
    }


def _kv_cache(plan: Plan, tp: int, dtype: str, left: int) -> dict[str, Any]:
    item = cache_item_bytes(dtype, 4 if plan.map.inference.dtype in ("float", "float32") else 2)
    try:
        cache = kv_cache(plan.checkpoints[plan.base].config, tp, item)
    except UnsupportedError as error:
        return {"dtype": dtype, "bytes": left, "bytes_per_token": None, "tokens": None, "text": error.what}
    tokens = int(left // cache.bytes_per_token)
    return {
        "dtype": dtype,
        "bytes": left,
        "bytes_per_token": cache.bytes_per_token,
        "tokens": tokens,
        "text": cache.text,
    }


def render(report: dict[str, Any], console: Console | None = None) -> None:
    """Print the report: the fullest rank by format and by kind of module, all ranks, and the cache."""
    console = console or (Console() if sys.stdout.isatty() else Console(width=180))
    fullest, many = report["ranks"][report["fullest_rank"]], report["tp"] > 1
    title = f"{Path(report['map']).name}: {report['modules']} modules"
    title += f", rank {report['fullest_rank']} of {report['tp']} (ep {report['ep']})" if many else ""
    table = Table(title=title, title_justify="left", box=None)
    table.add_column("weights by", overflow="fold")
    for name in ("modules", "memory", "16 bits"):
        table.add_column(name, justify="right", no_wrap=True)
    for group in ("by_format", "by_module_kind"):
        for name, total in fullest[group].items():
            table.add_row(name, f"{total['modules']:,}", human(total["bytes"]), human(total["bf16_bytes"]))
        table.add_row()
    modules = sum(total["modules"] for total in fullest["by_format"].values())
    table.add_row("all", f"{modules:,}", human(fullest["weight_bytes"]), human(fullest["bf16_bytes"]))
    console.print(table)
    for what, key in (("weights", "weight_bytes"), ("to read from disk", "read_bytes")):
        sizes = [rank[key] for rank in report["ranks"]]
        shown = [human(sizes[0])] if len(set(sizes)) == 1 else map(human, sizes)
        console.print(f"{what}{' on each rank' if many else ''}: {', '.join(shown)}", highlight=False)
    _render_cache(report, console)
    for warning in report["warnings"]:
        console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False)


def _render_cache(report: dict[str, Any], console: Console) -> None:
    cache, capacity = report["kv_cache"], human(report["gpu_memory_bytes"])
    share = f"{capacity} x {report['mem_fraction_static']} (--mem-fraction-static)"
    if not report["fits"]:
        console.print(f"the weights do not fit: {share} is less", style="red", highlight=False)
    elif cache["tokens"] is None:
        console.print(f"{human(cache['bytes'])} of {share} are left for the cache: {cache['text']}", highlight=False)
    else:
        console.print(
            f"about {cache['tokens']:,} tokens of cache: {human(cache['bytes'])} of {share}, "
            f"{cache['bytes_per_token']:,.10g} B a token ({cache['text']})",
            highlight=False,
        )
