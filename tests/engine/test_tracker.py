"""What is counted of a batch: its own rows, of experts that exist, once; and what a reset takes away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sglang_mixed.engine.serving import tracking
from sglang_mixed.engine.serving.tracking import MOST_ROWS_KEPT, ExpertTracker

LAYERS, EXPERTS, SHARED, TOP_K = (1, 3, 4), 6, 2, 2
Batch = dict[int, tuple[torch.Tensor, torch.Tensor]]


class CUDAGraphStandIn(TorchDispatchMode):
    """In place of a CUDA graph, which no CPU has: recorded operations run again on the same memory, without Python."""

    def __init__(self) -> None:
        super().__init__()
        self._recorded: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        self._recorded.append((function, args, kwargs or {}, output))
        return output

    def replay(self) -> None:
        for function, args, kwargs, output in self._recorded:
            again = function(*args, **kwargs)
            if again.data_ptr() != output.data_ptr():
                output.copy_(again)


@pytest.fixture
def tracker() -> ExpertTracker:
    layers = [(layer, EXPERTS, EXPERTS + SHARED) for layer in LAYERS]
    return ExpertTracker(layers, TOP_K, torch.device("cpu"))


def batch(rows: int, seed: int = 0) -> Batch:
    """What each layer's router chose, as SGLang hands it on: some ids are -1 or of a shared expert."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(-1, EXPERTS + SHARED, (rows, TOP_K), generator=generator, dtype=torch.int32) for _ in LAYERS]
    return {layer: (one, torch.rand(rows, TOP_K, generator=generator)) for layer, one in zip(LAYERS, ids, strict=True)}


def run(tracker: ExpertTracker, routed: Batch) -> None:
    with tracker.forward_pass():
        for layer, (ids, weights) in routed.items():
            tracker.count(layer, ids, weights)


def by_hand(routed: Batch, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """[layers, experts]: tokens and weights of these rows."""
    tokens, sums = np.zeros((len(LAYERS), EXPERTS), np.int64), np.zeros((len(LAYERS), EXPERTS))
    for row, (ids, weights) in enumerate(routed.values()):
        pairs = zip(ids[first:last].flatten().tolist(), weights[first:last].flatten().tolist(), strict=True)
        for expert, weight in pairs:
            if 0 <= expert < EXPERTS:
                tokens[row, expert] += 1
                sums[row, expert] += weight
    return tokens, sums


def piecewise(tracker: ExpertTracker, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(tracking, "is_in_tc_piecewise_cuda_graph", lambda: True)
    return 12


def lone_layer(tracker: ExpertTracker, monkeypatch: pytest.MonkeyPatch) -> int:
    """A layer that runs by itself, as where the graph holds less than the whole pass."""
    monkeypatch.setattr(tracker, "forward_pass", lambda: torch.no_grad())
    return 12


@pytest.mark.parametrize("prepare", [lambda *_: 12, lambda *_: MOST_ROWS_KEPT + 5, piecewise, lone_layer])
def test_prefill_decode_and_padding_are_told_apart(
    prepare: Callable[..., int], tracker: ExpertTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = prepare(tracker, monkeypatch)
    routed = batch(rows)
    tracker.start_batch(prefill=5, decode=4)
    run(tracker, routed)
    counts = tracker.counts()
    (prefill, prefill_weights), (decode, decode_weights) = by_hand(routed, 0, 5), by_hand(routed, 5, 9)
    assert counts.layers == LAYERS and counts.top_k == TOP_K
    np.testing.assert_array_equal(counts.prefill, prefill)
    np.testing.assert_array_equal(counts.decode, decode)
    np.testing.assert_allclose(counts.weights, prefill_weights + decode_weights)


def test_what_is_captured_counts_the_rows_of_each_replay(tracker: ExpertTracker) -> None:
    static = batch(8, seed=1)
    with CUDAGraphStandIn() as graph:
        run(tracker, static)
    assert tracker.counts().total.sum() == 0, "capturing is no batch"
    expected = np.zeros((len(LAYERS), EXPERTS), np.int64)
    for seed, rows in enumerate((3, 8, 1), start=2):
        routed = batch(8, seed)
        for (ids, weights), (new_ids, new_weights) in zip(static.values(), routed.values(), strict=True):
            ids.copy_(new_ids)
            weights.copy_(new_weights)
        tracker.start_batch(prefill=0, decode=rows)
        graph.replay()
        expected += by_hand(routed, 0, rows)[0]
    counts = tracker.counts()
    np.testing.assert_array_equal(counts.decode, expected)
    assert counts.prefill.sum() == 0


def test_a_reset_returns_what_it_clears_and_the_lifetime_keeps_it(tracker: ExpertTracker) -> None:
    first, second = batch(7, seed=1), batch(9, seed=2)
    tracker.start_batch(prefill=7, decode=0)
    run(tracker, first)
    cleared = tracker.reset()
    assert tracker.counts().total.sum() == 0 and tracker.counts().last_active.max() == 0
    tracker.start_batch(prefill=0, decode=9)
    run(tracker, second)
    counts = tracker.counts()
    np.testing.assert_array_equal(cleared.prefill, by_hand(first, 0, 7)[0])
    np.testing.assert_array_equal(counts.total, by_hand(second, 0, 9)[0])
    np.testing.assert_allclose(counts.weights, by_hand(second, 0, 9)[1])
    np.testing.assert_array_equal(tracker.lifetime_counts().total, (cleared + counts).total)
    assert cleared.until == counts.since
    assert ((counts.last_active > 0) == (counts.total > 0)).all()


def test_a_pass_that_fails_leaves_nothing_to_the_next(tracker: ExpertTracker) -> None:
    routed = batch(4)
    tracker.start_batch(prefill=4, decode=0)
    with pytest.raises(RuntimeError, match="out of memory"), tracker.forward_pass():
        tracker.count(LAYERS[0], *routed[LAYERS[0]])
        raise RuntimeError("out of memory")
    run(tracker, routed)
    np.testing.assert_array_equal(tracker.counts().prefill, by_hand(routed, 0, 4)[0])


def test_a_sum_of_weights_grows_however_large_it_is(tracker: ExpertTracker) -> None:
    ids = torch.zeros(1, TOP_K, dtype=torch.int32)
    tracker.start_batch(prefill=0, decode=1)
    for weight in (2.0**30, 0.25, 0.25):  # float32 would stay at 2^31
        tracker.count(LAYERS[0], ids, torch.full((1, TOP_K), weight))
    assert tracker.counts().weights[0, 0] == 2.0**31 + 1.0
