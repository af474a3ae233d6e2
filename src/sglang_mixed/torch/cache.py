"""Dequantized weights that are kept for a while, within a limit: memory for speed where no kernel is fast."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch


class DequantizationCache:
    """The least recently used weights go first. `limit_bytes` 0 keeps nothing.

    Counts `hits`, `misses` and `evictions`; `nbytes` never exceeds the limit. Any number of threads may use it.
    """

    def __init__(self, limit_bytes: int = 0) -> None:
        self.limit_bytes = limit_bytes
        self.hits = self.misses = self.evictions = self.nbytes = 0
        self._weights: OrderedDict[Hashable, torch.Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[object, ...]:
        # A copied or saved model begins with an empty cache of its own.
        return DequantizationCache, (self.limit_bytes,)

    def takes(self, nbytes: int) -> bool:
        """Whether a weight of this size may be kept at all."""
        return nbytes <= self.limit_bytes

    def get(self, key: Hashable, dequantize: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The weight under this key, or else what `dequantize` returns, which is kept if it fits the limit."""
        with self._lock:
            found = self._weights.get(key)
            if found is not None:
                self.hits += 1
                self._weights.move_to_end(key)
                return found
            self.misses += 1
        weight = dequantize()
        with self._lock:
            if self.takes(weight.nbytes) and key not in self._weights:
                self._make_room(weight.nbytes)
                self._weights[key] = weight
                self.nbytes += weight.nbytes
        return weight

    def _make_room(self, nbytes: int) -> None:
        while self.nbytes + nbytes > self.limit_bytes:
            _, oldest = self._weights.popitem(last=False)
            self.nbytes -= oldest.nbytes
            self.evictions += 1

    def clear(self) -> None:
        """Keep nothing any longer; the counts go on."""
        with self._lock:
            self._weights.clear()
            self.nbytes = 0

    def stats(self) -> dict[str, int]:
        """`limit_bytes`, `bytes`, `weights`, `hits`, `misses`, `evictions`."""
        with self._lock:
            return {
                "limit_bytes": self.limit_bytes,
                "bytes": self.nbytes,
                "weights": len(self._weights),
                "hits": self.hits,
                "misses": self.misses,
                "evictions": self.evictions,
            }
