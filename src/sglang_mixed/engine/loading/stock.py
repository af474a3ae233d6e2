"""Parameters that SGLang's own layers hold, all in 16 bits: watched as they fill, and read back from where they went.

Models skip names they do not know, and leave unfilled what nobody delivers, without a word. So every parameter's
`weight_loader` is wrapped: each call strikes out the lines it fills, by the bytes it writes, and remembers which file
tensor filled them.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.linear import MergedColumnParallelLinear, QKVParallelLinear
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from sglang.srt.model_loader.weight_utils import default_weight_loader

from ...formats import tensor_specs
from ...formats.base import Axis, TensorSpec
from ...plan import RankPlan
from ..names import Shard
from .file_tensors import Converted, FileTensors, StockTensor, Whole, file_dtype
from .kernel_builds import Kernel
from .ledger import Ledger, Line
from .transfer import Transfer
from .written import Written

#: Local name of the tensors that GPT-OSS copies into their parameters itself.
COPIED = "sinks"
_PLACES: dict[Shard, int] = {"q": 0, "k": 1, "v": 2, "w1": 0, "w3": 1}


class StockParameters:
    """Every parameter of a model: what layers of ours hold is none."""

    def __init__(self, plan: RankPlan, ledger: Ledger, transfer: Transfer) -> None:
        self._plan, self._ledger, self._transfer = plan, ledger, transfer
        #: Memory of a tensor that was given to the model -> its checkpoint name. Some models load in threads.
        self._given: dict[int, str] = {}
        self._latest = ""
        self.given: list[str] = []
        self.tensors: dict[str, StockTensor] = {}
        self._padding = 0
        self._parameters: list[torch.nn.Parameter] = []
        self._converted: list[Converted] = []

    @property
    def padding(self) -> int:
        """Bytes that hold no weight: rows SGLang adds to a vocabulary or a block, and what a wider dtype adds."""
        return self._padding + sum(module.padding for module in self._converted)

    @property
    def compiled(self) -> set[Kernel]:
        """What SGLang compiles at the first calls of the model's layers."""
        return set().union(*(module.compiled for module in self._converted))

    def watch(self, model: torch.nn.Module) -> None:
        """Open the ledger's lines for all stock parameters and wrap their loaders."""
        seen: set[int] = set()
        for prefix, module in model.named_modules():
            if isinstance(module, Converted):
                self._converted.append(module)
            if isinstance(module, FileTensors):  # the ledger knows them already
                self.tensors |= module.tensors
                continue
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                self._parameters.append(parameter)
                shares = {Line(prefix, *slot, name): share for slot, share in _slots(module, name).items()}
                total = sum(shares.values())
                for line, share in shares.items():
                    self._ledger.expect(line, parameter.nbytes * share // total)
                self._wrap(module, parameter, list(shares))

    def give(self, name: str, tensor: torch.Tensor) -> None:
        """Note a tensor that the model's `load_weights` gets next."""
        self._given[tensor.untyped_storage().data_ptr()] = self._latest = name
        self.given.append(name)

    def adopt(self, model: torch.nn.Module) -> None:
        """Note what the model copied without asking a loader; the proof compares it like all else."""
        parameters = dict(model.named_parameters())
        for name in self.given:
            module, _, local = name.rpartition(".")
            if local == COPIED and name in parameters and name not in self.tensors:
                self._ledger.arrive(parameters[name].nbytes, Line(module, None, None, local))
                spec, stored = self._spec(name, parameters[name]), self._plan.plan.modules[module].format
                self.tensors[name] = StockTensor(parameters[name], (), spec.shape, file_dtype(stored, local))

    def filled(self) -> None:
        """All weights have arrived, and no kernel has repacked them yet: note what is padding."""
        ours = {id(parameter) for parameter in self._parameters}
        held = sum(tensor.nbytes for tensor in self.tensors.values() if id(tensor.parameter) in ours)
        self._padding = sum(parameter.nbytes for parameter in self._parameters) - held

    def release(self) -> None:
        """Kernels take over: what they replace must not be kept alive here."""
        self._parameters.clear()
        for tensor in self.tensors.values():
            tensor.release()

    def _wrap(self, module: torch.nn.Module, parameter: torch.nn.Parameter, lines: list[Line]) -> None:
        original = getattr(parameter, "weight_loader", default_weight_loader)
        whole = Whole(self._transfer)

        def load(param: torch.nn.Parameter, loaded_weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            shard = kwargs.get("shard_id", args[0] if args and "expert_id" not in kwargs else None)
            expert = kwargs.get("expert_id")
            # A call without a shard delivers all of them at once (tensors that are fused on disk).
            filled = [line for line in lines if line.expert == expert and shard in (None, line.shard)]
            if not filled:
                return original(param, loaded_weight, *args, **kwargs)
            name = self._given.get(loaded_weight.untyped_storage().data_ptr(), self._latest)
            spec = self._spec(name, loaded_weight)
            index = _index(module, shard, expert, spec)
            self.tensors[name] = StockTensor(param, index, spec.shape, loaded_weight.dtype)
            with Written(param) as written:
                result = original(param, loaded_weight, *args, **kwargs)
            self._ledger.arrive(written.nbytes, *filled)
            whole.arrive(name, self.tensors[name])
            return result

        # SGLang's typed parameters have a read-only property of that name.
        own = isinstance(getattr(type(parameter), "weight_loader", None), property)
        setattr(parameter, "_weight_loader" if own else "weight_loader", load)

    def _spec(self, name: str, tensor: torch.Tensor) -> TensorSpec:
        """What this rank holds of a tensor."""
        module, _, local = name.rpartition(".")
        part = self._plan.parts[module]
        if local == "bias":
            begin, end = part.wanted.rows
            return TensorSpec((), (end - begin,), (Axis("out"),))
        specs = tensor_specs(part.format)
        return specs.get(local) or TensorSpec((), tuple(tensor.shape), (Axis("out"),) * tensor.dim())


def vocabularies(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Full name -> memory of the embeddings and heads that this rank holds whole."""
    return {
        f"{prefix}.weight": module.weight.data
        for prefix, module in model.named_modules()
        if isinstance(module, VocabParallelEmbedding) and module.tp_size == 1
    }


def _slots(module: torch.nn.Module, name: str) -> dict[tuple[Shard, int | None], int]:
    """(shard, expert) -> its share of the parameter; what the shares add up to is the whole of it."""
    if isinstance(module, QKVParallelLinear):
        return {(shard, None): rows for shard, rows in zip("qkv", _part_rows(module), strict=True)}
    if isinstance(module, MergedColumnParallelLinear):
        return {(index, None): rows for index, rows in enumerate(_part_rows(module))}
    if isinstance(module, FusedMoE):
        shards = ("w2",) if name.startswith("w2") else ("w1", "w3")
        first = module.moe_ep_rank * module.num_local_experts
        return {(shard, first + index): 1 for index in range(module.num_local_experts) for shard in shards}
    return {(None, None): 1}


def _index(module: Any, shard: Shard, expert: int | None, spec: TensorSpec) -> tuple[int | slice, ...]:
    """Where a file tensor lies in the parameter: its expert, and its rows of the fused matrix."""
    before: tuple[int, ...] = ()
    if expert is not None:
        before = (expert % module.num_local_experts,)
    place = _PLACES.get(shard, shard)
    axis = next((dim for dim, one in enumerate(spec.axes) if one.role == "out"), None)
    if axis is None:
        return before
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
