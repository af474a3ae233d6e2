"""Parameters that SGLang's own methods hold: watched as they fill, and read back where each file tensor went.

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

from ..formats import tensor_specs
from ..formats.base import Axis, Shape, TensorSpec
from ..plan import RankPlan
from .ledger import Ledger, Line
from .names import Shard, expert_modules, fused_parts

_PLACES: dict[Shard, int] = {"q": 0, "k": 1, "v": 2, "w1": 0, "w3": 1}


@dataclass(slots=True)
class StockTensor:
    """This rank's part of a file tensor inside a parameter; the engine may hold it in another dtype than the file."""

    parameter: torch.nn.Parameter
    index: tuple[int | slice, ...]
    shape: Shape
    stored: torch.dtype

    def restore(self) -> torch.Tensor:
        """The part as it lies in memory, without padding, in the shape that was read."""
        return self.parameter.data[self.index].reshape(self.shape)

    @property
    def is_cast(self) -> bool:
        """Whether the engine holds another dtype than the file."""
        return self.parameter.dtype != self.stored


class StockParameters:
    """Every parameter of a model: what layers of ours hold is none."""

    def __init__(self, plan: RankPlan, ledger: Ledger) -> None:
        self._plan, self._ledger = plan, ledger
        self.delivering = ""  # the checkpoint name of the tensor that is being delivered
        self.tensors: dict[str, StockTensor] = {}
        self.padding = 0  # bytes that hold no weight, such as the rows SGLang adds to a vocabulary
        self._parameters: list[torch.nn.Parameter] = []

    def watch(self, model: torch.nn.Module) -> None:
        """Open the ledger's lines for all stock parameters and wrap their loaders."""
        seen: set[int] = set()
        for prefix, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) in seen or self._is_made_by_kernel(prefix, module, name):
                    continue
                seen.add(id(parameter))
                self._parameters.append(parameter)
                lines = [Line(prefix, shard, expert, name) for shard, expert in _slots(module, name)]
                for line in lines:
                    self._ledger.expect(line)
                self._wrap(module, parameter, lines)

    def filled(self) -> None:
        """All weights have arrived, and no kernel has repacked them yet: note what is padding."""
        held = sum(tensor.restore().nbytes for tensor in self.tensors.values())
        self.padding = sum(parameter.nbytes for parameter in self._parameters) - held

    def _wrap(self, module: torch.nn.Module, parameter: torch.nn.Parameter, lines: list[Line]) -> None:
        original = getattr(parameter, "weight_loader", default_weight_loader)

        def load(param: torch.nn.Parameter, loaded_weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            shard = kwargs.get("shard_id", args[0] if args and "expert_id" not in kwargs else None)
            expert = kwargs.get("expert_id")
            # A call without a shard delivers all of them at once (tensors that are fused on disk).
            filled = [line for line in lines if line.expert == expert and shard in (None, line.shard)]
            for line in filled:
                self._ledger.arrive(line)
            if filled:
                spec = self._spec(loaded_weight)
                index = _index(module, shard, expert, spec, param)
                self.tensors[self.delivering] = StockTensor(param, index, spec.shape, loaded_weight.dtype)
            return original(param, loaded_weight, *args, **kwargs)

        # SGLang's typed parameters have a read-only property of that name.
        own = isinstance(getattr(type(parameter), "weight_loader", None), property)
        setattr(parameter, "_weight_loader" if own else "weight_loader", load)

    def _is_made_by_kernel(self, prefix: str, module: torch.nn.Module, name: str) -> bool:
        """Whether a quantized layer's parameter is none of the checkpoint's tensors (Marlin's sorted g_idx, say)."""
        modules = self._plan.plan.modules
        if isinstance(module, FusedMoE):
            first, local = expert_modules(prefix, 0, modules)[0], name.partition("_")[2]
        else:
            first, local = fused_parts(prefix, modules)[0][1], name
        planned = modules.get(first)
        return planned is not None and planned.format.name != "plain" and local not in planned.tensors

    def _spec(self, tensor: torch.Tensor) -> TensorSpec:
        """What this rank holds of the tensor that is being delivered."""
        name, _, local = self.delivering.rpartition(".")
        part = self._plan.parts[name]
        if local == "bias":
            begin, end = part.wanted.rows
            return TensorSpec((), (end - begin,), (Axis("out"),))
        specs = tensor_specs(part.format)
        return specs.get(local) or TensorSpec((), tuple(tensor.shape), (Axis("out"),) * tensor.dim())


def _slots(module: torch.nn.Module, name: str) -> Iterator[tuple[Shard, int | None]]:
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


def _index(
    module: Any, shard: Shard, expert: int | None, spec: TensorSpec, parameter: torch.Tensor
) -> tuple[int | slice, ...]:
    """Where a file tensor lies in the parameter: its expert, and its rows of the fused matrix."""
    before: tuple[int, ...] = ()
    if expert is not None:
        before = (expert % module.num_local_experts,)
    place = _PLACES.get(shard, shard)
    axis = next((dim for dim, one in enumerate(spec.axes) if one.role == "out"), None)
    if axis is None:
        # A per-tensor scale has one entry a part; what follows the inputs (g_idx) is the same for all parts.
        per_tensor = not any(one.role for one in spec.axes) and parameter.dim() > len(before)
        return (*before, place) if isinstance(place, int) and per_tensor else before
    begin = 0
    if isinstance(place, int):
        sizes = _part_rows(module)
        begin = spec.axes[axis].length(sum(sizes[:place]))
    rows = slice(begin, begin + spec.shape[axis])
    return (*before, *(slice(None) for _ in range(axis)), rows)


def _part_rows(module: Any) -> list[int]:
    if isinstance(module, FusedMoE):
        return [module.intermediate_size_per_partition] * 2
    return list(module.output_partition_sizes)
