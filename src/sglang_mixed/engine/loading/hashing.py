"""SHA-256 trees of tensors on the GPU, by the GPU: nothing of them travels back, and no processor hashes them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from ...digests import LEAF, num_leaves, root

Named = tuple[str, torch.Tensor]
#: A tensor's leaves are hashed side by side: with those of so many bytes the GPU has enough to do.
AT_ONCE = 64 << 20
#: Leaves of a program, which is one warp; bytes that the kernel reads at once.
LANES, WORD = 32, 4


class Hasher:
    """Of many tensors at once, as often as enough of them have arrived."""

    def __init__(self) -> None:
        self._waiting: list[Named] = []
        self._begun: list[tuple[str, int]] = []
        self._leaves: list[torch.Tensor] = []

    def add(self, tensors: Iterable[Named]) -> None:
        """Nothing will write to these tensors but the copies that have begun when they are hashed."""
        self._waiting.extend(tensors)

    def begin(self, at_least: int = AT_ONCE) -> None:
        """Once so many bytes have come, behind the copies that have begun."""
        waiting = list(self._waiting)  # some models load in threads, which add more
        if waiting and sum(tensor.nbytes for _, tensor in waiting) >= at_least:
            del self._waiting[: len(waiting)]
            self._begun += [(name, num_leaves(tensor.nbytes)) for name, tensor in waiting]
            self._leaves.append(leaves_of([tensor for _, tensor in waiting]))

    def finish(self) -> dict[str, str]:
        """Name -> root of the tree over the tensor's bytes in row-major order; of all that were added."""
        self.begin(0)
        if not self._begun:
            return {}
        found = torch.cat(self._leaves).cpu().numpy().tobytes()
        ends = itertools.accumulate(32 * number for _, number in self._begun)
        return {
            name: root(found[end - 32 * number : end]) for (name, number), end in zip(self._begun, ends, strict=True)
        }


def prepare() -> None:
    """Have the kernel compiled."""
    leaves_of([torch.zeros(1, device="cuda")])


def leaves_of(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """uint8 [leaves, 32] on the GPU: SHA-256 of every `LEAF` bytes of one tensor after the other."""
    from ...kernels.sha256 import hash_pieces  # Triton is there where a GPU is

    whole = [one if one.is_contiguous() and one.data_ptr() % WORD == 0 else _copy(one) for one in tensors]
    sizes = np.array([one.nbytes for one in whole])
    counts = np.array([num_leaves(one.nbytes) for one in whole])
    begins = LEAF * (np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts))
    pieces = np.empty((len(begins), 2), np.int64)
    pieces[:, 0] = np.repeat([one.data_ptr() for one in whole], counts) + begins
    pieces[:, 1] = np.minimum(np.repeat(sizes, counts) - begins, LEAF)
    digests = torch.empty(len(pieces), 8, dtype=torch.uint32, device=whole[0].device)
    hash_pieces[(-(-len(pieces) // LANES),)](
        torch.from_numpy(pieces).to(digests.device, non_blocking=True), digests, len(pieces), LANES=LANES, num_warps=1
    )
    return digests.view(torch.uint8)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """The same in row-major order, from a whole word on."""
    return tensor.clone(memory_format=torch.contiguous_format)
