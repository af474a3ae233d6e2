"""What the tensor-parallel ranks of one model tell each other; every rank must call these, in the same order."""

from __future__ import annotations

import platform
from typing import Any

import torch

from ..errors import EngineError


def gather(value: Any) -> list[Any]:
    """This picklable value of every rank, in their order."""
    from sglang.srt.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    values = [value] * group.world_size
    if group.world_size > 1:
        torch.distributed.all_gather_object(values, value, group=group.cpu_group)
    return values


def data_parallel_rank(scheduler: Any) -> int:
    """The number of this scheduler's copy of the model."""
    from sglang.srt.runtime_context import get_parallel

    # Schedulers themselves know their place until 0.5.20.
    place = scheduler.ps if hasattr(scheduler, "ps") else get_parallel()
    return place.dp_rank or 0


def is_first_of_host() -> bool:
    """Whether this rank speaks for all of its host."""
    from sglang.srt.distributed.parallel_state import get_tp_group

    return gather(platform.node()).index(platform.node()) == get_tp_group().rank_in_group


def agree_on_plan(fingerprint: str) -> None:
    """Raise EngineError on every rank unless all have one plan: each node reads a map and files of its own."""
    fingerprints = gather(fingerprint)
    if len(set(fingerprints)) > 1:
        plans = ", ".join(f"rank {rank}: {one[:12]}" for rank, one in enumerate(fingerprints))
        raise EngineError(
            f"the ranks do not have one plan ({plans})",
            rule="every node is given the same map, and checkpoints with the same headers",
            remedy="copy the map and the checkpoints of one node to the others",
        )
