"""Parameters that SGLang's own methods hold (norms, embeddings, routers, biases): watched as they fill.

Models skip names they do not know, and leave unfilled what nobody delivers, without a word. So every parameter's
`weight_loader` is wrapped: each call strikes out the lines it fills and remembers which file tensor filled them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.linear import MergedColumnParallelLinear, QKVParallelLinear
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.model_loader.weight_utils import default_weight_loader

from .ledger import Ledger, Line


@dataclass(slots=True)
class StockTensor:
    """One file tensor inside a parameter: rows [begin, begin + shape[0]) of it, cast where the dtypes differ."""

    parameter: torch.nn.Parameter
    begin: int
    shape: torch.Size
    stored: torch.dtype

    def restore(self) -> torch.Tensor:
        """The tensor as it lies in memory, without padding."""
        data = self.parameter.data
        return data.narrow(0, self.begin, self.shape[0]) if self.shape else data.reshape(())

    @property
    def is_cast(self) -> bool:
        """Whether the engine holds another dtype than the file."""
        return self.parameter.dtype != self.stored


class StockParameters:
    """Every parameter of a model that is not a placeholder of ours."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.delivering = ""  # the checkpoint name of the tensor that is being delivered
        self.tensors: dict[str, StockTensor] = {}
        self._parameters: list[torch.nn.Parameter] = []

    def watch(self, model: torch.nn.Module) -> None:
        """Open the ledger's lines for all stock parameters and wrap their loaders."""
        seen: set[int] = set()
        for prefix, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) in seen or getattr(parameter, "is_placeholder", False):
                    continue
                seen.add(id(parameter))
                self._parameters.append(parameter)
                lines = [Line(prefix, shard, expert, name) for shard, expert in _slots(module, name)]
                for line in lines:
                    self._ledger.expect(line)
                self._wrap(module, parameter, lines)

    @property
    def nbytes(self) -> int:
        """Bytes of memory of all stock parameters, padding included."""
        return sum(parameter.untyped_storage().nbytes() for parameter in self._parameters)

    @property
    def padding(self) -> int:
        """Bytes that hold no weight (rows SGLang adds to a vocabulary)."""
        held = sum(tensor.restore().nbytes for tensor in self.tensors.values())
        return self.nbytes - held

    def _wrap(self, module: torch.nn.Module, parameter: torch.nn.Parameter, lines: list[Line]) -> None:
        original = getattr(parameter, "weight_loader", default_weight_loader)

        def load(param: torch.nn.Parameter, loaded_weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            shard = kwargs.get("shard_id", args[0] if args and "expert_id" not in kwargs else None)
            filled = [line for line in lines if _fills(line, shard, kwargs.get("expert_id"))]
            for line in filled:
                self._ledger.arrive(line)
            if filled:
                begin = _begin(module, filled[0].shard)
                self.tensors[self.delivering] = StockTensor(param, begin, loaded_weight.shape, loaded_weight.dtype)
            return original(param, loaded_weight, *args, **kwargs)

        attribute = "_weight_loader" if isinstance(getattr(type(parameter), "weight_loader", None), property) else None
        setattr(parameter, attribute or "weight_loader", load)


def _slots(module: torch.nn.Module, name: str) -> Iterator[tuple[str | int | None, int | None]]:
    if isinstance(module, QKVParallelLinear):
        yield from (("q", None), ("k", None), ("v", None))
    elif isinstance(module, MergedColumnParallelLinear):
        yield from ((index, None) for index in range(len(module.output_sizes)))
    elif isinstance(module, FusedMoE):
        shards = ("w2",) if name.startswith("w2") else ("w1", "w3")
        first = module.moe_ep_rank * module.num_local_experts
        yield from ((shard, first + index) for index in range(module.num_local_experts) for shard in shards)
    else:
        yield None, None


def _fills(line: Line, shard: str | int | None, expert: int | None) -> bool:
    """A call without a shard delivers all of them at once (tensors that are fused on disk)."""
    return line.expert == expert and (shard is None or line.shard == shard)


def _begin(module: torch.nn.Module, shard: str | int | None) -> int:
    if shard is None or isinstance(module, FusedMoE):
        return 0
    index = {"q": 0, "k": 1, "v": 2}[shard] if isinstance(shard, str) else shard
    sizes: Any = module.output_partition_sizes
    return sum(sizes[:index])
