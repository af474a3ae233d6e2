"""From ranks that are started one by one, or a node's at a time, to SGLang's nodes."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ParallelismError


@dataclass(frozen=True, slots=True)
class Place:
    """Where one process stands: node `node` of the `nodes` that make copy `copy` of `copies`.

    SGLang's data parallelism stays inside one node: copies that span nodes, or have nodes of their own, are servers
    of their own. `dp` copies are inside this process's server.
    """

    nodes: int
    node: int
    dp: int
    copy: int
    copies: int


def place_of(tp: int, dp: int, rank: int, ranks_per_node: int, world_size: int | None = None) -> Place:
    """The place of the process whose first rank is `rank`: ranks are numbered by copy, then by tensor-parallel rank.

    Raises ParallelismError where so many ranks a node do not make whole copies, or do not divide one.
    """
    world, per_node = tp * dp, min(ranks_per_node, tp * dp)
    if world_size not in (None, world):
        raise ParallelismError(
            f"--world-size {world_size} with tp {tp} × dp {dp}",
            rule=f"every rank is started: {tp} × {dp} = {world}",
            remedy=f"--world-size {world}",
        )
    if per_node < 1 or max(per_node, tp) % min(per_node, tp) or world % per_node:
        raise ParallelismError(
            f"{ranks_per_node} ranks a node, tp {tp} × dp {dp}",
            rule="a node's ranks are whole copies of the model, or divide one",
            remedy="choose --ranks-per-node among the divisors and multiples of --tp-size",
        )
    if rank % per_node or not 0 <= rank < world:
        raise ParallelismError(
            f"--rank {rank} with {per_node} ranks a node",
            rule="it is the first rank of its node: " + ", ".join(map(str, range(0, world, per_node))),
            remedy="start every node once, with its own --rank",
        )
    if per_node >= tp:
        return Place(1, 0, per_node // tp, rank // per_node, world // per_node)
    return Place(tp // per_node, rank % tp // per_node, 1, rank // tp, dp)
