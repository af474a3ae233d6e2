"""What the mixed model that this process serves, or whose `sgl.Engine` it runs, tells of its memory and experts."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import operator
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from ...config import MixedPrecisionMap
from ...errors import EngineError, UnsupportedError
from ...experts import ExpertActivationTracker, ExpertCounts, ExpertExport, ExpertFormats
from ...experts.report import REASONS
from ...experts.tracker import shared_tracker
from .. import state
from .questions import Question, ask, expert_answer, manager

Answers = TypeVar("Answers")


def get_mixed_precision_memory_stats() -> dict[str, Any]:
    """Totals of the mixed model that this process serves, or whose `sgl.Engine` it runs.

    `weight_bytes`, `planned_bytes`, `bf16_bytes` (what 16 bits would take), `memory_saved_mb` (MiB),
    `compression_ratio`, and `by_format` / `by_module_kind`, each {modules, bytes, bf16_bytes}.
    Raises EngineError where no such model runs.
    """
    if state.proof is not None:
        return state.proof.report(modules=False)
    if state.tokenizer_manager is None:
        raise EngineError(
            "no mixed-precision model runs in this process",
            remedy="start sgl.Engine(enable_mixed_precision=True, ...), or ask a server: sglang-mixed proof URL",
        )
    return _wait(ask(Question.MEMORY))[0]


def add_counts(answers: list[dict[str, Any]]) -> ExpertCounts | None:
    """What all DP ranks have counted, together; None where nothing is counted."""
    if answers[0]["state"] != "counting":
        return None
    return functools.reduce(operator.add, (ExpertCounts.from_json(answer["counts"]) for answer in answers))


def export_experts(answers: list[dict[str, Any]]) -> ExpertExport:
    """The same as an export. Raises UnsupportedError where nothing is counted."""
    counts = add_counts(answers)
    if counts is None:
        raise UnsupportedError(REASONS[answers[0]["state"]])
    return ExpertExport.of_counts(counts, ExpertFormats.from_json(answers[0]["formats"]))


class EngineTracker(ExpertActivationTracker):
    """The tracker of the model that runs in this process: it reads and resets the engine's own counts."""

    def record_expert_activation(
        self, layer_id: int, expert_id: int, tokens_processed: int = 1, request_id: str | None = None
    ) -> None:
        """Raises UnsupportedError: what the engine routes is counted already."""
        raise UnsupportedError(
            "the engine counts its experts by itself", remedy="record in an ExpertActivationTracker() of your own"
        )

    def snapshot(self) -> ExpertExport:
        """The engine's counts at this moment. Raises UnsupportedError where it does not count."""
        return dataclasses.replace(_experts_here(Question.EXPERTS), requests=super().snapshot().requests)

    def reset_stats(self) -> ExpertExport:
        """Start again from nothing; returns what was cleared, so that no count is lost."""
        requests = super().reset_stats().requests
        return dataclasses.replace(_experts_here(Question.RESET_EXPERTS), requests=requests)


def _experts_here(question: Question) -> ExpertExport:
    return export_experts([expert_answer(question)] if state.proof is not None else _wait(ask(question)))


def get_global_expert_tracker() -> ExpertActivationTracker:
    """The tracker that all of this process share: of the mixed model it runs, else of the torch model loaded last.

    Before either, one that counts what is recorded.
    """
    runs_here = state.proof is not None or state.tokenizer_manager is not None
    return _engine_tracker() if runs_here else shared_tracker()


@functools.cache
def _engine_tracker() -> EngineTracker:
    return EngineTracker()


def get_expert_activation_stats(layer_id: int | None = None, expert_id: int | None = None) -> dict[str, Any]:
    """`expert_stats`, `layer_stats` and `top_experts` of the global tracker, and more under `sglang_mixed`.

    Of a layer or an expert: as its `get_expert_stats`.
    """
    tracker = get_global_expert_tracker()
    if layer_id is None and expert_id is None:
        return tracker.snapshot().to_json()
    return tracker.get_expert_stats(layer_id, expert_id)


def reset_expert_activation_stats() -> dict[str, Any]:
    """Start the global tracker again from nothing; returns what was cleared, as `get_expert_activation_stats` does."""
    return get_global_expert_tracker().reset_stats().to_json()


def export_expert_activation_stats(file_path: str | Path) -> None:
    """Write the global tracker's statistics as JSON, whole or not at all. Raises ExpertExportError."""
    get_global_expert_tracker().export_stats(file_path)


def described_map() -> MixedPrecisionMap:
    """The map in force, as the HTTP process was given it."""
    extra = json.loads(manager().server_args.model_loader_extra_config)
    return MixedPrecisionMap.from_json(extra["mixed_precision"]["map"])


def _wait(answers: Coroutine[Any, Any, Answers]) -> Answers:
    """The answers, from outside of the engine's event loop."""
    loop = manager().event_loop or asyncio.get_event_loop()
    if not loop.is_running():
        return loop.run_until_complete(answers)
    if asyncio._get_running_loop() is loop:
        answers.close()
        raise EngineError(
            "this call would wait for the event loop that it runs in",
            remedy="call it in a thread: await asyncio.to_thread(...)",
        )
    return asyncio.run_coroutine_threadsafe(answers, loop).result()
