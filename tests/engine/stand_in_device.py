"""In place of CUDA's copies and page-locked memory: a queue, of which nothing arrives before it is waited for."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sglang_mixed.engine.loading import hashing, transfer
from sglang_mixed.engine.loading.slabs import Slab

from .gpu_model import leaves_on_cpu


class StandInDevice:
    """What `PinnedTransfer` asks CUDA for, on the CPU: copies arrive when they are waited for, and not before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pending: deque[tuple[torch.Tensor, torch.Tensor]] = deque()
        self.most_pending = self.calls = self.pinned = self._pending_bytes = 0
        self.callers, self.chosen = set[int](), set[tuple[int, int]]()
        self._begun = 0
        self._working = threading.Lock()
        self._copy = torch.Tensor.copy_
        device = self

        class StandInEvent:
            """A place in the queue of copies."""

            def __init__(self) -> None:
                self._place = 0

            def record(self) -> None:
                self._place = device._begun

            def synchronize(self) -> None:
                device.arrive(self._place)

        for name, value in {
            "current_device": lambda: 3,
            "set_device": lambda number: self.chosen.add((threading.get_ident(), number)),
            "Event": StandInEvent,
            "synchronize": lambda: self.arrive(self._begun),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(transfer, "pinned", self._lend)
        monkeypatch.setattr(transfer, "on_device", lambda shape, dtype: torch.empty(shape, dtype=dtype))
        monkeypatch.setattr(Slab, "has_nan", self._in_order(Slab.has_nan))
        monkeypatch.setattr(hashing, "leaves_of", self._in_order(leaves_on_cpu))
        monkeypatch.setattr(transfer, "prepare", lambda: None)
        monkeypatch.setattr(torch, "_foreach_copy_", self._copy_all)
        monkeypatch.setattr(torch.Tensor, "copy_", self._copying())

    def arrive(self, place: int) -> None:
        with self._working:
            while self.pending and self._begun - len(self.pending) < place:
                to, tensor = self.pending.popleft()
                self._pending_bytes -= tensor.nbytes
                self._copy(to, tensor)

    def _begin(self, to: torch.Tensor, tensor: torch.Tensor) -> None:
        with self._working:
            self._begun += 1
            self.pending.append((to, tensor))
            self._pending_bytes += tensor.nbytes
            self.most_pending = max(self.most_pending, self._pending_bytes)

    def _lend(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        found = torch.empty(shape, dtype=dtype)
        self.pinned += found.nbytes
        return found

    def _copy_all(self, places: list[torch.Tensor], tensors: list[torch.Tensor], non_blocking: bool) -> None:
        assert non_blocking
        self.calls += 1
        self.callers.add(threading.get_ident())
        for place, tensor in zip(places, tensors, strict=True):
            assert place.shape == tensor.shape
            self._begin(place, tensor)

    def _in_order(self, operator: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """Of operators that are queued behind copies on a GPU."""

        def run(*args: Any) -> torch.Tensor:
            self.arrive(self._begun)
            return operator(*args)

        return run

    def _copying(self) -> Callable[..., torch.Tensor]:
        def copy(place: torch.Tensor, tensor: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
            if not non_blocking:
                return self._copy(place, tensor)
            self._begin(place, tensor)
            return place

        return copy
