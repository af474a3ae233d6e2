"""What the weights occupy, by format and by kind of module, against what 16 bits would take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from .formats import label_of
from .plan import RankPlan


@dataclass(frozen=True, slots=True)
class ModuleBytes:
    """A module's share: its format's label, its kind (attention, experts, ...), its bytes, and those of 16 bits.

    `count` modules have the same.
    """

    format: str
    kind: str
    nbytes: int
    bf16_bytes: int
    count: int = 1


def rank_memory(rank: RankPlan) -> dict[str, Any]:
    """`memory_stats` of what one rank holds."""
    return memory_stats(_shares(rank))


def _shares(rank: RankPlan) -> Iterator[ModuleBytes]:
    for group in rank.groups:
        label = label_of(rank.plan.modules[group.names[0]].format)
        # Experts are many, and all of one kind.
        kinds = {"experts": len(group.names)} if group.is_expert else Counter(map(module_kind, group.names))
        for kind, count in kinds.items():
            yield ModuleBytes(label, kind, group.nbytes, group.bf16_bytes, count)


def memory_stats(modules: Iterable[ModuleBytes]) -> dict[str, Any]:
    """Totals in bytes (`memory_saved_mb` in MiB); `compression_ratio` is 16-bit bytes over actual bytes."""
    by_format: dict[str, dict[str, int]] = {}
    by_kind: dict[str, dict[str, int]] = {}
    by_both: dict[str, dict[str, dict[str, int]]] = {}
    nothing = {"modules": 0, "bytes": 0, "bf16_bytes": 0}
    total = dict(nothing)
    for module in modules:
        for totals in (
            by_format.setdefault(module.format, dict(nothing)),
            by_kind.setdefault(module.kind, dict(nothing)),
            by_both.setdefault(module.format, {}).setdefault(module.kind, dict(nothing)),
            total,
        ):
            totals["modules"] += module.count
            totals["bytes"] += module.count * module.nbytes
            totals["bf16_bytes"] += module.count * module.bf16_bytes
    return {
        "weight_bytes": total["bytes"],
        "bf16_bytes": total["bf16_bytes"],
        "memory_saved_mb": (total["bf16_bytes"] - total["bytes"]) / 2**20,
        "compression_ratio": total["bf16_bytes"] / total["bytes"] if total["bytes"] else 1.0,
        "by_format": by_format,
        "by_module_kind": by_kind,
        "by_format_and_kind": by_both,
    }


#: Where a name part says what kind of module it belongs to; the first that is found counts.
_KINDS = {
    "experts": ("experts",),
    "router": ("gate", "router"),
    "norm": ("norm", "layernorm"),
    "attention": ("self_attn", "attn", "attention"),
    "mlp": ("mlp", "feed_forward", "shared_expert", "shared_experts"),
    "embedding": ("embed_tokens", "wte"),
    "lm_head": ("lm_head",),
}


def module_kind(name: str) -> str:
    """experts, router, norm, attention, mlp, embedding, lm_head or other, from a module's name."""
    if name.endswith("norm"):
        return "norm"
    parts = name.split(".")
    return next((kind for kind, marks in _KINDS.items() if any(mark in parts for mark in marks)), "other")
