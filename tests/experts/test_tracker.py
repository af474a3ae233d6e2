from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest

from sglang_mixed.errors import ExpertCountsError
from sglang_mixed.experts import ExpertActivationTracker, merge, read_export
from sglang_mixed.experts.tracker import MAX_REQUESTS


@pytest.fixture
def tracker() -> ExpertActivationTracker:
    tracker = ExpertActivationTracker()
    tracker.record_expert_activation(0, 1, 10)
    tracker.record_expert_activation(0, 1, tokens_processed=5, request_id="a")
    tracker.record_expert_activation(2, 0)
    tracker.record_request("a", input_length=12, output_length=3)
    return tracker


def test_the_json_has_exactly_the_fields_that_the_first_users_know(
    tracker: ExpertActivationTracker, tmp_path: Path
) -> None:
    tracker.export_stats(tmp_path / "stats.json")
    written = json.loads((tmp_path / "stats.json").read_text())
    last = {name: entry.pop("last_activation_time") for name, entry in written["expert_stats"].items()}
    assert all(time > 1.7e9 for time in last.values())
    extra = written.pop("sglang_mixed")
    assert written == {
        "expert_stats": {
            "layer_0_expert_1": {
                "layer_id": 0,
                "expert_id": 1,
                "activation_count": 2,
                "total_tokens_processed": 15,
            },
            "layer_2_expert_0": {
                "layer_id": 2,
                "expert_id": 0,
                "activation_count": 1,
                "total_tokens_processed": 1,
            },
        },
        "layer_stats": {
            "0": {
                "total_experts": 1,
                "total_activations": 2,
                "total_tokens": 15,
                "experts": {"1": {"activation_count": 2, "total_tokens_processed": 15}},
            },
            "2": {
                "total_experts": 1,
                "total_activations": 1,
                "total_tokens": 1,
                "experts": {"0": {"activation_count": 1, "total_tokens_processed": 1}},
            },
        },
        "top_experts": [
            {"layer_id": 0, "expert_id": 1, "activation_count": 2, "total_tokens_processed": 15},
            {"layer_id": 2, "expert_id": 0, "activation_count": 1, "total_tokens_processed": 1},
        ],
    }
    assert extra["requests"] == {"a": {"input_length": 12, "output_length": 3, "activations": 1}}
    assert extra["since"] <= min(last.values()) <= max(last.values()) <= extra["until"]


def test_stats_can_be_asked_of_one_expert_one_layer_or_one_number(tracker: ExpertActivationTracker) -> None:
    assert tracker.get_expert_stats(0, 1)["total_tokens_processed"] == 15
    assert tracker.get_expert_stats(5, 5) == {}
    assert list(tracker.get_expert_stats(layer_id=2)) == ["layer_2_expert_0"]
    assert list(tracker.get_expert_stats(expert_id=1)) == ["layer_0_expert_1"]
    assert list(tracker.get_layer_stats()) == [0, 2]
    assert [one["layer_id"] for one in tracker.get_top_experts(1)] == [0]
    assert tracker.get_top_experts(0) == tracker.get_top_experts(-1) == []


def test_threads_lose_no_count_and_a_reset_returns_what_it_clears() -> None:
    tracker = ExpertActivationTracker()
    cleared = []

    def work(number: int) -> None:
        for step in range(2000):
            tracker.record_expert_activation(step % 3, number, 2)
            if step % 500 == 499:
                cleared.append(tracker.reset_stats())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    total = merge([*cleared, tracker.snapshot()])
    assert sum(one.activation_count for one in total.experts) == 8000
    assert sum(one.total_tokens_processed for one in total.experts) == 16000
    assert len(total.experts) == 12


def test_a_tracker_remembers_the_latest_requests_only_and_a_second_call_corrects_the_first() -> None:
    tracker = ExpertActivationTracker()
    for number in range(MAX_REQUESTS + 5):
        tracker.record_request(f"request-{number}", number, 0)
    tracker.record_request("request-7", 7, 70)
    requests = tracker.get_requests()
    assert len(requests) == MAX_REQUESTS and "request-4" not in requests
    assert requests["request-7"] == {"input_length": 7, "output_length": 70, "activations": 0}


def test_numbers_of_numpy_are_numbers_and_negative_ones_are_refused(tmp_path: Path) -> None:
    tracker = ExpertActivationTracker()
    tracker.record_expert_activation(np.int64(1), np.int32(2), np.int64(3))  # type: ignore[arg-type]
    tracker.export_stats(tmp_path / "stats.json")
    assert read_export(tmp_path / "stats.json").experts == tracker.snapshot().experts
    with pytest.raises(ExpertCountsError, match="expert -1"):
        tracker.record_expert_activation(0, -1)
    with pytest.raises(ExpertCountsError, match="output_length"):
        tracker.record_request("a", 1, -1)
    with pytest.raises(TypeError):
        tracker.record_expert_activation(0, 1.5)  # type: ignore[arg-type]
