"""The tracker as the first users know it, for any program that knows which experts it runs.

On a server the engine counts on its device instead; its tracker answers from those counts.
"""

from __future__ import annotations

import operator
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

from ..errors import ExpertCountsError
from .export import ExpertExport, RequestLengths
from .files import write_export
from .statistics import ExpertActivity, expert_stats, layer_stats, top_experts

#: Requests that are remembered; the oldest are forgotten first.
MAX_REQUESTS = 1000


class ExpertActivationTracker:
    """Counts the activations of experts; any number of threads may record and read.

    >>> tracker = ExpertActivationTracker()
    >>> tracker.record_expert_activation(layer_id=0, expert_id=3, tokens_processed=5)
    >>> tracker.get_top_experts(1)
    [{'layer_id': 0, 'expert_id': 3, 'activation_count': 1, 'total_tokens_processed': 5}]
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._clear()

    def _clear(self) -> None:
        self._since = time.time()
        self._experts: dict[tuple[int, int], ExpertActivity] = {}
        self._requests: OrderedDict[str, RequestLengths] = OrderedDict()

    def record_expert_activation(
        self, layer_id: int, expert_id: int, tokens_processed: int = 1, request_id: str | None = None
    ) -> None:
        """One activation, of so many tokens. Raises ExpertCountsError for a negative number."""
        layer, expert, tokens = map(operator.index, (layer_id, expert_id, tokens_processed))
        if min(layer, expert, tokens) < 0:
            raise ExpertCountsError(f"layer {layer}, expert {expert}, {tokens} tokens", rule="none of them is negative")
        with self._lock:
            known = self._experts.get((layer, expert), ExpertActivity(layer, expert, 0, 0.0, 0))
            self._experts[layer, expert] = ExpertActivity(
                layer, expert, known.activation_count + 1, time.time(), known.total_tokens_processed + tokens
            )
            if request_id is not None:
                request = self._requests.get(request_id, RequestLengths())
                self._remember(request_id, request, activations=request.activations + 1)

    def record_request(self, request_id: str, input_length: int, output_length: int) -> None:
        """The lengths of a request in tokens; a second call corrects the first. Raises ExpertCountsError."""
        lengths = {"input_length": operator.index(input_length), "output_length": operator.index(output_length)}
        if min(lengths.values()) < 0:
            raise ExpertCountsError(f"request {request_id!r}: {lengths}", rule="no length is negative")
        with self._lock:
            self._remember(request_id, self._requests.get(request_id, RequestLengths()), **lengths)

    def _remember(self, request_id: str, request: RequestLengths, **changes: int) -> None:
        self._requests[request_id] = request.model_copy(update=changes)
        self._requests.move_to_end(request_id)
        if len(self._requests) > MAX_REQUESTS:
            self._requests.popitem(last=False)

    def snapshot(self) -> ExpertExport:
        """Everything at this moment."""
        with self._lock:
            experts = tuple(self._experts[key] for key in sorted(self._experts))
            return ExpertExport(experts, self._since, time.time(), requests=dict(self._requests))

    def get_expert_stats(self, layer_id: int | None = None, expert_id: int | None = None) -> dict[str, Any]:
        """Of one expert its five fields, {} if it was never active; otherwise `layer_L_expert_E` -> these fields."""
        chosen = [
            one
            for one in self.snapshot().experts
            if layer_id in (None, one.layer_id) and expert_id in (None, one.expert_id)
        ]
        if layer_id is not None and expert_id is not None:
            return chosen[0]._asdict() if chosen else {}
        return expert_stats(chosen)

    def get_top_experts(self, top_k: int = 10) -> list[dict[str, Any]]:
        """The most activated experts first."""
        return top_experts(self.snapshot().experts, top_k)

    def get_layer_stats(self) -> dict[int, dict[str, Any]]:
        """Layer -> totals and experts."""
        return layer_stats(self.snapshot().experts)

    def get_requests(self) -> dict[str, dict[str, int]]:
        """The last 1,000 requests by id: `input_length`, `output_length`, `activations`."""
        return {name: request.model_dump() for name, request in self.snapshot().requests.items()}

    def reset_stats(self) -> ExpertExport:
        """Start again from nothing; returns what was cleared, so that no count is lost."""
        with self._lock:
            experts = tuple(self._experts[key] for key in sorted(self._experts))
            cleared = ExpertExport(experts, self._since, time.time(), requests=dict(self._requests))
            self._clear()
        return cleared

    def export_stats(self, file_path: str | Path) -> None:
        """Write everything as JSON, whole or not at all. Raises ExpertExportError."""
        write_export(file_path, self.snapshot())


_shared = [ExpertActivationTracker()]


def shared_tracker() -> ExpertActivationTracker:
    """The tracker of the torch model that this process loaded last; before that, one that counts what is recorded."""
    return _shared[0]


def share_tracker(tracker: ExpertActivationTracker) -> None:
    """Have `shared_tracker` give this one from now on."""
    _shared[0] = tracker
