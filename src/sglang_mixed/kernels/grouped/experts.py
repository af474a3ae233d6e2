"""A MoE layer of experts stored in any formats, on the Triton kernels of `passes.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from . import launch, parts, passes
from .launch import Cut, ceil_div, next_power_of_2, tiles_for_experts
from .table import Weight, codecs_of, line, table

#: Sums over top-k are in float32: tokens are taken in turns, which bounds their memory.
TOKENS_AT_ONCE = 4096
SORTED_AT_ONCE = 1024


class ExpertWeights(NamedTuple):
    """One expert's matrices."""

    gate: Weight
    up: Weight
    down: Weight


@dataclass(frozen=True, slots=True)
class Activation:
    """`silu` and `gelu` times up; `swiglu` is GPT-OSS's, with its alpha and limit.

    `limited_silu` limits gate and up before SiLU, as DeepSeek-V4 does; `silu_limited` limits its result, and up.
    """

    name: str = "silu"
    alpha: float = 1.0
    limit: float = 0.0


class GroupedExperts:
    """All experts of a layer, their tensors kept alive. gate and up are [intermediate, hidden], down is the reverse."""

    def __init__(
        self,
        experts: Sequence[ExpertWeights],
        hidden: int,
        intermediate: int,
        activation: Activation,
        factor: float = 1.0,
    ) -> None:
        self._experts, self.hidden, self.intermediate = tuple(experts), hidden, intermediate
        self._activation, self._factor = activation, factor
        self.gate_up_codecs = codecs_of(weight for expert in experts for weight in expert[:2])
        self.down_codecs = codecs_of(expert.down for expert in experts)
        codecs = (*self.gate_up_codecs, *self.down_codecs)
        self._takes_registers = any(codec.takes_registers for codec in codecs)
        self._registers = launch.FEW_REGISTERS if all(codec.is_sliced for codec in codecs) else None
        sides = (self.gate_up_codecs, self.gate_up_codecs, self.down_codecs)
        lines = [line(weight, side) for expert in experts for weight, side in zip(expert, sides, strict=True)]
        device = experts[0].gate.tensors["weight"].device
        self._table = table(lines, device)
        #: Parts of each sum that have been written; see `parts.is_last`.
        self._arrived = torch.zeros(launch.most_sums(hidden, intermediate), dtype=torch.int32, device=device)
        # Sorted columns meet x in an order of their own.
        self.are_alike = all(one.gate.codec == one.up.codec and not one.gate.codec.is_ordered for one in experts)
        self.has_bias = any(weight.bias is not None for expert in experts for weight in expert)

    def run(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """x [tokens, hidden], the router's weights and ids [tokens, top-k] -> weighted sums [tokens, hidden].

        Ids are places in the list of experts; -1 is skipped. Sums are in float32, rounded once to x's dtype.
        """
        output = self.empty(*x.shape, like=x)
        for begin in range(0, len(x), TOKENS_AT_ONCE):
            part = slice(begin, begin + TOKENS_AT_ONCE)
            self._run(x[part].contiguous(), weights[part].contiguous(), ids[part].contiguous(), output[part])
        return output

    def empty(self, *shape: int, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Where every tensor that kernels write comes from."""
        return like.new_empty(shape, dtype=dtype)

    def _run(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, output: torch.Tensor) -> None:
        is_few = ids.numel() <= min(launch.FEW_PAIRS, 16 * len(self._experts))
        (self._run_in_parts if is_few else self._run_whole)(x, weights, ids, output)

    def cuts(self, pairs: int) -> tuple[Cut, Cut]:
        """How gate and up, and down, are cut along their columns for few pairs."""
        return launch.cut_experts(self.hidden, self.intermediate, pairs, self._takes_registers)

    def _run_in_parts(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, output: torch.Tensor) -> None:
        top_k, num_pairs, experts = ids.shape[1], ids.numel(), ids.flatten().to(torch.int32)
        first, second = self.cuts(num_pairs)
        common = {"HIDDEN": self.hidden, "INTERMEDIATE": self.intermediate, "TOP_K": top_k, "HAS_BIAS": self.has_bias}
        common |= launch.overlap(x)
        hidden = self.empty(num_pairs, self.intermediate, like=x)
        sums = self.empty(first.parts, num_pairs, 2, self.intermediate, like=x, dtype=torch.float32)
        parts.gate_up_parts[first.grid_of_pairs(self.intermediate, num_pairs, 2)](
            x, sums, self._arrived, hidden, self._table, experts, self._activation.alpha, self._activation.limit,
            CODECS=self.gate_up_codecs, ACTIVATION=self._activation.name, PARTS=first.parts, **common,
            **launch.options(first.tiles, x, self._registers),
        )  # fmt: skip
        sums = self.empty(second.parts, num_pairs, self.hidden, like=x, dtype=torch.float32)
        parts.down_parts[second.grid_of_pairs(self.hidden, num_pairs)](
            hidden, sums, self._arrived, output, self._table, experts, weights, self._factor,
            SLOTS=next_power_of_2(top_k), CODECS=self.down_codecs, PARTS=second.parts, **common,
            **launch.options(second.tiles, x, self._registers),
        )  # fmt: skip

    def _run_whole(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, output: torch.Tensor) -> None:
        top_k, number = ids.shape[1], len(self._experts)
        first, second = tiles_for_experts(ids.numel() / number, self._takes_registers)
        pairs, experts = self._sort(ids, first.rows)
        blocks = len(experts)
        hidden = self.empty(ids.numel(), self.intermediate, like=x)
        # A program of as many rows of both gate and up as another has of one.
        half = first._replace(outputs=first.outputs // 2) if self.are_alike else first
        overlap = launch.overlap(x)
        passes.gate_up[(ceil_div(self.intermediate, half.outputs), blocks)](
            x, hidden, self._table, pairs, experts, self._activation.alpha, self._activation.limit,
            HIDDEN=self.hidden, INTERMEDIATE=self.intermediate, TOP_K=top_k, CODECS=self.gate_up_codecs,
            ACTIVATION=self._activation.name, ALIKE=self.are_alike, HAS_BIAS=self.has_bias, **overlap,
            **launch.options(half, x),
        )  # fmt: skip
        sums = self.empty(ids.numel(), self.hidden, like=x, dtype=torch.float32)
        passes.down[(ceil_div(self.hidden, second.outputs), blocks)](
            hidden, sums, self._table, pairs, experts, weights,
            HIDDEN=self.hidden, INTERMEDIATE=self.intermediate, CODECS=self.down_codecs,
            HAS_BIAS=self.has_bias, **overlap, **launch.options(second, x),
        )  # fmt: skip
        columns = min(1024, next_power_of_2(self.hidden))
        passes.sum_slots[(len(x), ceil_div(self.hidden, columns))](
            sums, ids, output, self._factor, HIDDEN=self.hidden, TOP_K=top_k, BLOCK=columns, **overlap
        )

    def _sort(self, ids: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Pairs int32 [blocks, rows], those of a block of one expert, -1 in places without one; the blocks' experts."""
        num_pairs, number = ids.numel(), len(self._experts)
        blocks = min(num_pairs, num_pairs // rows + min(number, num_pairs))
        pairs = self.empty(blocks, rows, like=ids, dtype=torch.int32)
        experts = self.empty(blocks, like=ids, dtype=torch.int32)
        chunk = min(SORTED_AT_ONCE, max(16, next_power_of_2(num_pairs)))
        passes.sort_pairs[(number,)](
            ids, pairs, experts, num_pairs, blocks,
            NUM_EXPERTS=number, BINS=next_power_of_2(number + 1), BLOCK_M=rows, CHUNK=chunk,
            **launch.overlap(ids),
        )  # fmt: skip
        return pairs, experts
