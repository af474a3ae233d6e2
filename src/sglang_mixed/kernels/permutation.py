"""Act-order: columns sorted by their group, so that a kernel finds groups one after another."""

from __future__ import annotations

import torch

from ..errors import UnsupportedError


def sorting(g_idx: torch.Tensor, group_size: int, name: str) -> torch.Tensor:
    """int32 [in] that sorts the columns of g_idx [in], called `name`, into whole consecutive groups.

    Raises UnsupportedError where groups are not of one size.
    """
    permutation = torch.argsort(g_idx, stable=True).to(torch.int32)
    if not torch.equal(inverse(permutation) // group_size, g_idx):
        raise UnsupportedError(
            f"{name} does not give every group the same number of columns",
            tensor=name,
            rule=f"{group_size} columns of each group",
        )
    return permutation


def inverse(permutation: torch.Tensor) -> torch.Tensor:
    """int32 [in]: where each column went."""
    places = torch.empty_like(permutation)
    places[permutation] = torch.arange(len(permutation), dtype=torch.int32)
    return places
