"""Counts of the tokens routed to each expert, kept on the device by the forward pass itself.

What the layers route is kept until the model's forward pass ends, and then added for all layers at once: a few kernels
a step, inside the CUDA graph. Where a graph holds less than the whole pass, each layer adds its own.
"""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.topk import TopK, TopKOutputChecker
from sglang.srt.model_executor.runner_backend_utils.tc_piecewise_cuda_graph import is_in_tc_piecewise_cuda_graph

from ...experts import ExpertCounts
from .. import state

logger = logging.getLogger(__name__)

#: Of a longer batch every layer adds its own rows at once, so that none are kept.
MOST_ROWS_KEPT = 1024
#: How exactly it is told when an expert was last active: to tell the device costs more than a step's other work here.
CLOCK_SECONDS = 0.01
_PHASES = PREFILL, DECODE, PADDING = range(3)


class ExpertTracker:
    """One model's counts in this process. Tensors are [phases, layers, slots], flat, on the model's device.

    Slot 0 is where -1 counts, an id that means no expert, and slot 1 + e expert e's. The phase of padding, and of what
    is run only to warm up or to be captured, is never read. A reset only moves `since`: what is on the device grows.
    """

    def __init__(self, layers: Sequence[tuple[int, int, int]], top_k: int, device: torch.device) -> None:
        """`layers`: (decoder layer, routed experts, slots that its router's ids may name) of each MoE layer."""
        self.layers = tuple(layer for layer, _, _ in layers)
        self._experts, slots = max(experts for _, experts, _ in layers), 1 + max(ids for *_, ids in layers)
        self._top_k = top_k
        self._rows = {layer: row for row, layer in enumerate(self.layers)}
        self._shape = (len(_PHASES), len(layers), slots)
        self._phase_slots = len(layers) * slots
        size = len(_PHASES) * self._phase_slots
        self._tokens = torch.zeros(size, dtype=torch.int64, device=device)
        # A float32 sum would stop growing after some ten million tokens.
        self._weights = torch.zeros(size, dtype=torch.float64, device=device)
        self._last_active = torch.zeros(size, dtype=torch.float64, device=device)
        self._first_slots = torch.arange(1, self._phase_slots, slots, device=device).view(-1, 1, 1)
        self._one = torch.ones((), dtype=torch.int64, device=device)
        self._now = torch.zeros((), dtype=torch.float64, device=device)
        #: The first row of the batch that is decode, and the first that is padding.
        self._bounds = torch.zeros(len(_PHASES) - 1, dtype=torch.int64, device=device)
        #: [rows, 1]: where the slots of each row's phase begin; the same for batches that are not longer.
        self._begins = torch.full((MOST_ROWS_KEPT, 1), PADDING * self._phase_slots, device=device)
        self._filled = (0, 0)
        self._device = torch.get_device_module(device)
        self._kept: list[tuple[int, torch.Tensor, torch.Tensor]] | None = None
        self._stream: Any = None
        self._told = 0.0
        self._since = time.time()
        self._before = self._read()

    def start_batch(self, prefill: int, decode: int) -> None:
        """The rows of the batch that is computed next: so many of prefill, then so many of decode, then padding."""
        bounds = prefill, prefill + decode
        if self._filled != bounds:
            self._filled = bounds
            for phase, (begin, end) in enumerate(pairwise((0, *bounds, MOST_ROWS_KEPT))):
                self._begins[begin:end] = phase * self._phase_slots
            for place, bound in enumerate(bounds):
                self._bounds[place] = bound
        if (now := time.time()) - self._told > CLOCK_SECONDS:
            self._now.fill_(now)
            self._told = now
        self._stream = self._device.current_stream()

    @contextmanager
    def forward_pass(self) -> Iterator[None]:
        """Around a forward pass of the whole model: its layers are added together where it ends."""
        self._kept = []
        try:
            yield
            kept, self._kept = self._kept, None
            self._add_all(kept)
        finally:
            self._kept = None

    def count(self, layer: int, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """What a layer's router chose: global expert ids [rows, top-k], -1 for none, and their weights."""
        row = self._rows[layer]
        # A piece that was captured is not run by Python again: nothing could be kept for the end of the pass.
        if self._kept is None or len(ids) > MOST_ROWS_KEPT or is_in_tc_piecewise_cuda_graph():
            self._add(self._first_slots[row : row + 1], ids[None], weights[None])
        else:
            self._kept.append((row, ids, weights))

    def _add_all(self, kept: Sequence[tuple[int, torch.Tensor, torch.Tensor]]) -> None:
        rows = [row for row, _, _ in kept]
        if rows == list(range(len(self.layers))) and len({ids.shape for _, ids, _ in kept}) == 1:
            ids, weights = (torch.stack(tensors) for tensors in list(zip(*kept, strict=True))[1:])
            self._add(self._first_slots, ids, weights)
            return
        for row, ids, weights in kept:
            self._add(self._first_slots[row : row + 1], ids[None], weights[None])

    def _add(self, first_slots: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """ids and weights [layers, rows, top-k]; first_slots [layers, 1, 1]."""
        rows = ids.shape[1]
        if rows <= MOST_ROWS_KEPT:
            begins = self._begins[:rows]
        else:
            phases = torch.bucketize(torch.arange(rows, device=ids.device), self._bounds, right=True)
            begins = phases[:, None] * self._phase_slots
        slots = (ids + first_slots).add_(begins).view(-1)
        self._tokens.index_add_(0, slots, self._one.expand(len(slots)))
        self._weights.index_add_(0, slots, weights.double().view(-1))
        self._last_active.index_put_((slots,), self._now)

    def counts(self) -> ExpertCounts:
        """What was counted since the last reset. Waits for the batches that are being computed, and for no others."""
        return self._between(self._before, self._read())

    def lifetime_counts(self) -> ExpertCounts:
        """What was counted since the model was loaded, whatever was reset."""
        return self._between(tuple(np.zeros_like(array) for array in self._before), self._read())

    def reset(self) -> ExpertCounts:
        """Begin anew; returns what was counted until now, so that every token is in one of the two."""
        now = self._read()
        counts = self._between(self._before, now)
        self._before, self._since = now, counts.until
        return counts

    def _read(self) -> tuple[np.ndarray, ...]:
        """Tokens, weights and times, all as after one and the same step: read where the steps are queued."""
        with self._device.stream(self._stream):
            tensors = [
                tensor.view(self._shape)[:PADDING, :, 1 : 1 + self._experts].clone()
                for tensor in (self._tokens, self._weights, self._last_active)
            ]
            return tuple(tensor.cpu().numpy() for tensor in tensors)

    def _between(self, before: tuple[np.ndarray, ...], now: tuple[np.ndarray, ...]) -> ExpertCounts:
        tokens, weights = now[0] - before[0], (now[1] - before[1]).sum(axis=0)
        last_active = np.where(tokens.sum(axis=0) > 0, now[2].max(axis=0), 0.0)
        return ExpertCounts(
            self.layers,
            tokens[PREFILL],
            tokens[DECODE],
            weights,
            last_active,
            self._since,
            time.time(),
            self._top_k,
        )


def load_model(original: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
    """Hook around `ModelRunner.load_model`: a mixed model's experts are counted unless the operator said not to."""
    result = original(runner, *args, **kwargs)
    extra = json.loads(runner.server_args.model_loader_extra_config or "{}")
    if extra.get("mixed_precision", {}).get("track_experts") and not runner.is_draft_worker:
        state.tracker = track(runner.model)
    return result


def track(model: torch.nn.Module) -> ExpertTracker | None:
    """Count what this model's forward passes route; None for a model without experts."""
    found = sorted((m for m in model.modules() if isinstance(m, FusedMoE)), key=lambda layer: layer.layer_id)
    if not found:
        return None
    layers = [(one.layer_id, one.num_experts - one.num_fused_shared_experts, one.num_experts) for one in found]
    # Not every model tells its expert layers how many are chosen, but all have them chosen by this class.
    choice = next(module.topk_config for module in model.modules() if isinstance(module, TopK))
    device = next(model.parameters()).device
    tracker = ExpertTracker(layers, choice.top_k - found[0].num_fused_shared_experts, device)
    forward = model.forward

    @functools.wraps(forward)
    def forward_and_add(*args: Any, **kwargs: Any) -> Any:
        with tracker.forward_pass():
            return forward(*args, **kwargs)

    model.forward = forward_and_add
    return tracker


def init_batch(original: Callable[..., Any], cls: type, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """Hook around `ForwardBatch.init_new`: it is not told how many of a mixed batch's requests are decoded."""
    forward_batch = original(cls, batch, *args, **kwargs)
    forward_batch.num_decoded = len(batch.decoding_reqs or ())  # one row each
    return forward_batch


def forward(original: Callable[..., Any], runner: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
    """Hook around `ModelRunner.forward`, the one way in which batches are computed: their rows, before any padding."""
    if state.tracker is not None:
        mode, ids = forward_batch.forward_mode, forward_batch.input_ids
        rows = len(forward_batch.input_embeds if ids is None else ids)
        decoded = rows if mode.is_decode() or mode.is_target_verify() else getattr(forward_batch, "num_decoded", 0)
        state.tracker.start_batch(rows - decoded, decoded)
    return original(runner, forward_batch, *args, **kwargs)


def forward_impl(
    original: Callable[..., torch.Tensor], layer: Any, hidden_states: torch.Tensor, topk_output: Any, **kwargs: Any
) -> torch.Tensor:
    """Hook around `FusedMoE.forward_impl`, which every MoE model calls with global ids, before they are dispatched."""
    if state.tracker is not None:
        if TopKOutputChecker.format_is_standard(topk_output):
            state.tracker.count(layer.layer_id, topk_output.topk_ids, topk_output.topk_weights)
        else:
            logger.warning("experts are not counted: SGLang's MoE kernels choose them themselves here")
            state.tracker = None
    return original(layer, hidden_states, topk_output, **kwargs)
