"""Our metrics on SGLang's `/metrics`: what the weights occupy, and what the experts do.

Every label has as many values as the model has formats, kinds, ranks, layers or experts; of experts, ten at a time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from prometheus_client import make_asgi_app, multiprocess
from prometheus_client.core import CollectorRegistry, CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ...experts import ExpertCounts
from ...experts.balance import gini, top_share
from .questions import Question, ask
from .statistics import add_counts

logger = logging.getLogger(__name__)

TOP_EXPERTS = 10
#: A scrape does not wait longer than that for a busy scheduler; it then gives the figures of the last one.
PATIENCE_SECONDS = 2.0
Answers = list[dict[str, Any]]


class MixedPrecisionCollector(Collector):
    """What the schedulers last answered, as metrics."""

    def __init__(self) -> None:
        self._memory: Answers = []
        self._experts: Answers = []
        self._asking: asyncio.Task[None] | None = None

    async def refresh(self) -> None:
        """Ask the schedulers, or go on waiting for what they were asked before."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask())
        await asyncio.wait({self._asking}, timeout=PATIENCE_SECONDS)
        if self._asking.done() and (error := self._asking.exception()):
            logger.warning("metrics of the mixed model: %s", error)

    async def _ask(self) -> None:
        # What was loaded stays as it is.
        self._memory = self._memory or await ask(Question.MEMORY)
        self._experts = await ask(Question.LIFETIME_EXPERTS)

    def collect(self) -> Iterator[Metric]:
        """The metrics, without those that are not known yet."""
        if self._memory:
            yield from memory_metrics(self._memory)
        if self._experts and (counts := add_counts(self._experts)):
            yield from expert_metrics(counts)


def memory_metrics(answers: Answers) -> Iterator[Metric]:
    """Per rank: bytes by format and kind of module, and what loading them took."""
    ranks = ["dp_rank", "tp_rank"]
    weights = GaugeMetricFamily(
        "sglang_mixed_weight_bytes", "Bytes of the weights in memory.", labels=["format", "kind", *ranks]
    )
    in_16_bits = GaugeMetricFamily(
        "sglang_mixed_weight_16_bit_bytes", "Bytes of the same weights in 16 bits.", labels=["format", "kind", *ranks]
    )
    single = {
        "compression_ratio": ("sglang_mixed_compression_ratio", "Bytes in 16 bits over bytes in memory."),
        "load_seconds": ("sglang_mixed_load_seconds", "Time that loading the model took."),
        "bytes_read": ("sglang_mixed_load_read_bytes", "Bytes of weights read from the checkpoints."),
    }
    families = {key: GaugeMetricFamily(name, text, labels=ranks) for key, (name, text) in single.items()}
    for group in answers:
        for report in group.get("tensor_parallel_ranks", [group]):
            rank = [str(group["data_parallel_rank"]), str(report["rank"]["number"])]
            for label, kinds in report["by_format_and_kind"].items():
                for kind, totals in kinds.items():
                    weights.add_metric([label, kind, *rank], totals["bytes"])
                    in_16_bits.add_metric([label, kind, *rank], totals["bf16_bytes"])
            for key, family in families.items():
                family.add_metric(rank, report[key])
    return iter([weights, in_16_bits, *families.values()])


def expert_metrics(counts: ExpertCounts) -> Iterator[Metric]:
    """Of all ranks together, since the model was loaded: per layer, and the most active experts."""
    tokens = CounterMetricFamily(
        "sglang_mixed_expert_activations", "Tokens routed to the layer's experts.", labels=["layer", "phase"]
    )
    for phase, array in (("prefill", counts.prefill), ("decode", counts.decode)):
        for layer, number in zip(counts.layers, array.sum(axis=1).tolist(), strict=True):
            tokens.add_metric([str(layer), phase], number)
    yield tokens
    total = counts.total
    yield _per_layer("gini", "Inequality: 0 where all experts of the layer get as many tokens.", counts, gini(total))
    yield _per_layer("top_tenth_share", "Share of the layer's most active tenth.", counts, top_share(total))
    top = GaugeMetricFamily(
        "sglang_mixed_top_expert_activations", "Tokens routed to the most active experts.", labels=["layer", "expert"]
    )
    for cell in np.argsort(-total, axis=None, kind="stable")[:TOP_EXPERTS].tolist():
        row, expert = divmod(cell, counts.experts)
        top.add_metric([str(counts.layers[row]), str(expert)], int(total[row, expert]))
    yield top


def _per_layer(name: str, text: str, counts: ExpertCounts, values: np.ndarray) -> Metric:
    family = GaugeMetricFamily(f"sglang_mixed_expert_{name}", text, labels=["layer"])
    for layer, value in zip(counts.layers, values.tolist(), strict=True):
        family.add_metric([str(layer)], value)
    return family


def metrics_app() -> Callable[..., Any]:
    """SGLang's ASGI app for `/metrics`, of all its processes, with ours beside."""
    registry, collector = CollectorRegistry(), MixedPrecisionCollector()
    multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    registry.register(collector)
    app = make_asgi_app(registry=registry)

    async def refreshed(scope: Any, receive: Any, send: Any) -> None:
        await collector.refresh()
        await app(scope, receive, send)

    return refreshed
