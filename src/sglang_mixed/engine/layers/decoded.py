"""Weights that our own Triton kernels multiply by: what no kernel of SGLang runs, or not together.

They take any mix of formats in one launch, and any cut: of a unit that a rank shares with another it holds all, and
computes its own part.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput

from ...checkpoint import join
from ...errors import EngineError
from ...formats import ModuleFormat
from ...formats.base import TORCH_DTYPES
from ...formats.fusion import fuse
from ...formats.slicing import whole
from ...kernels.grouped.arrange import arrange
from ...kernels.grouped.codec import CODES, codec_of, why_not
from ...kernels.grouped.table import Weight
from ...plan import Part, PlannedModule
from .. import state
from ..loading.file_tensors import Converted, FileTensors, StockTensor, TensorPlace, Whole
from ..loading.ledger import Line
from .moe import ExpertModules

__all__ = [
    "TRITON",
    "DecodedExperts",
    "DecodedRun",
    "is_like_those_measured",
    "tell",
    "why_not",
    "why_wished",
    "wishes",
]

logger = logging.getLogger(__name__)

#: What runs on our Triton kernels, if they read its format: what no kernel of SGLang runs ("needed"), the experts of
#: layers that mix as well ("mixed"), also what they are known to run faster than SGLang's ("faster", as long as nothing
#: else is said), or everything but 16-bit layers ("all").
TRITON = "SGLANG_MIXED_TRITON"
WISHES = ("faster", "mixed", "needed", "all")
#: The GPUs on which they are: Hopper's (benchmarks/gpu_linears.py, gpu_experts.py).
MEASURED_ON = 9
#: What static activations are scaled by; a kernel that does not quantize them has no use for it.
STATIC = ("input_scale", "input_global_scale")


class DecodedExperts(Converted):
    """Experts of any formats, in one launch. `numbers` are their places among this rank's experts."""

    def __init__(self, experts: Sequence[ExpertModules], numbers: list[int], dtype: torch.dtype) -> None:
        super().__init__()
        self.numbers, self._count = numbers, len(experts)
        parts = state.current_loading().plan.parts
        sets: dict[tuple[int, ModuleFormat, Part], list[int]] = {}
        for number, expert in enumerate(experts):
            for role, module in enumerate(expert):
                sets.setdefault((role, module.format, parts[module.name]), []).append(number)
        self._sets = [(role, part, members) for (role, _, part), members in sets.items()]
        for number, (role, part, members) in enumerate(self._sets):
            files = FileTensors([[experts[member][role]] for member in members], [part.held], dtype)
            self.add_module(f"files_{number}", files)
        self._biases = ExpertBiases(experts, dtype) if experts[0][0].bias else None
        (rows, columns) = parts[experts[0][2].name].wanted
        self._hidden, self._width = rows[1] - rows[0], columns[1] - columns[0]
        self._activation: tuple[Any, ...] = ()
        self._factor = 1.0

    def create_runner(self, config: Any, num_experts: int) -> None:
        """Note what SGLang's runner would do between the products and after them."""
        self._activation = (config.activation,)
        if config.gemm1_alpha is not None:
            self._activation = ("swiglu", config.gemm1_alpha, config.gemm1_clamp_limit)
        elif config.gemm1_clamp_limit is not None:
            self._activation = ("silu_limited", 1.0, config.gemm1_clamp_limit)
        elif getattr(config, "swiglu_limit", None) is not None:
            self._activation = ("limited_silu", 1.0, config.swiglu_limit)
        self._factor = 1.0 if config.routed_scaling_factor is None else config.routed_scaling_factor

    def prepare(self) -> None:
        """The files' layout gives way to the kernel's, set by set; what is not narrower than a byte stays in place."""
        from ...kernels.grouped.experts import Activation, ExpertWeights, GroupedExperts

        found: list[dict[int, Weight]] = [{} for _ in range(self._count)]
        for number, ((role, part, members), files) in enumerate(zip(self._sets, self.files, strict=False)):
            codec, tensors = _arranged(self, files, part, f"_{number}")
            for place, member in enumerate(members):
                bias = self._biases.of(role, member) if self._biases else None
                found[member][role] = Weight(codec, {name: one[place] for name, one in tensors.items()}, bias)
        experts = [ExpertWeights(one[0], one[1], one[2]) for one in found]
        self._layer = GroupedExperts(experts, self._hidden, self._width, Activation(*self._activation), self._factor)
        self.note_padding()

    def run(self, dispatch_output: StandardDispatchOutput, ids: torch.Tensor) -> torch.Tensor:
        """Weighted sums [tokens, hidden] over these experts; ids [tokens, top-k] count within them or are -1."""
        return self._layer.run(dispatch_output.hidden_states, dispatch_output.topk_output.topk_weights, ids)


class ExpertBiases(FileTensors):
    """Biases of experts in the activations' dtype: one parameter for each of gate, up and down, [experts, rows].

    Of ranks that add up an expert's output, only the first holds down's as it is; the others' count for nothing.
    """

    def __init__(self, experts: Sequence[ExpertModules], dtype: torch.dtype) -> None:
        torch.nn.Module.__init__(self)
        self.tensors: dict[str, StockTensor] = {}
        self._implied: set[str] = set()
        loading = state.current_loading()
        rank = loading.plan.rank
        self._adds_down = rank.number % rank.expert_tp == 0
        for role, name in enumerate(("gate", "up", "down")):
            begin, end = loading.plan.parts[experts[0][role].name].wanted.rows
            parameter = torch.nn.Parameter(torch.zeros(len(experts), end - begin, dtype=dtype), requires_grad=False)
            self.register_parameter(name, parameter)
            whole = Whole(loading.transfer)
            for number, module in enumerate(expert[role] for expert in experts):
                assert module.bias is not None
                full = join(module.name, "bias")
                tensor = StockTensor(parameter, (number,), (end - begin,), TORCH_DTYPES[module.bias])
                self.tensors[full] = tensor
                place = TensorPlace(whole, module, "bias", loading.plan.parts[module.name], tensor)
                loading.expect(Line(module.name, None, None, "bias"), full, place)

    def of(self, role: int, expert: int) -> torch.Tensor | None:
        """What is added to an expert's product on this rank."""
        return list(self.parameters())[role].data[expert] if role < 2 or self._adds_down else None


class DecodedRun(Converted):
    """One part of a linear layer, or several that can be one matrix."""

    def __init__(self, parts: Sequence[PlannedModule], dtype: torch.dtype) -> None:
        super().__init__()
        self.parts = parts
        planned = [state.current_loading().plan.parts[part.name] for part in parts]
        fused = fuse([part.format for part in planned])
        assert fused is not None
        self._part = planned[0] if len(parts) == 1 else Part(whole(fused.shape), whole(fused.shape), fused)
        self.file_tensors = FileTensors([parts], [part.held for part in planned], dtype)

    def convert(self) -> None:
        """The files' layout gives way to the kernel's."""
        from ...kernels.grouped.linear import DecodedLinear

        codec, tensors = _arranged(self, self.file_tensors, self._part)
        rows, columns = (end - begin for begin, end in self._part.wanted)
        self._linear = DecodedLinear(Weight(codec, {name: one[0] for name, one in tensors.items()}), rows, columns)
        self.note_padding()

    def run(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., in] -> [..., out of these parts]."""
        return self._linear.run(x, bias)


def why_wished(formats: Sequence[ModuleFormat]) -> str | None:
    """Why our kernel runs weights of these formats, as a rank holds them, though SGLang has one; None: it does not."""
    wish = wishes()
    if wish == "all" and all(one.name != "plain" and why_not(one) is None for one in formats):
        return f"{TRITON}=all"
    if wish == "faster" and all(map(is_faster, formats)):
        return "faster than SGLang's on this GPU"
    return None


def is_faster(module_format: ModuleFormat) -> bool:
    """Whether our kernel is known to be faster than SGLang's."""
    return is_measured_gpu() and is_like_those_measured(module_format)


def is_measured_gpu() -> bool:
    """Whether this GPU is like the one on which kernels were compared. (AMD's count their generations too.)"""
    is_nvidia = torch.cuda.is_available() and torch.version.hip is None
    return is_nvidia and torch.cuda.get_device_capability()[0] == MEASURED_ON


def is_like_those_measured(module_format: ModuleFormat) -> bool:
    """Whether weights are symmetric codes of 4 bits, in groups that are whole steps."""
    if why_not(module_format):
        return False
    codec = codec_of(module_format)
    return codec.kind == CODES and codec.is_sliced and not codec.takes_registers


def wishes() -> str:
    """The operator's choice among `WISHES`. Raises EngineError for any other word."""
    wish = os.environ.get(TRITON) or WISHES[0]
    if wish not in WISHES:
        raise EngineError(
            f"{TRITON}={wish}", rule=f"one of {', '.join(WISHES)}", remedy="correct the environment variable"
        )
    return wish


@functools.cache  # one line in the log for all layers alike
def tell(label: str, reason: str) -> None:
    """Say which weights run on the Triton kernel, and why."""
    logger.info("mixed precision: %s: our Triton kernel (%s)", label, reason)


def _arranged(
    holder: Converted, files: FileTensors, part: Part, suffix: str = ""
) -> tuple[Any, dict[str, torch.Tensor]]:
    tensors = files.take()
    holder.adopt({f"{name}{suffix}": tensors.pop(name) for name in STATIC if name in tensors})
    codec, found = arrange(tensors, part.format, codec_of(part.format, part.held, part.wanted))
    holder.adopt({f"{name}{suffix}": tensor for name, tensor in found.items()})
    return codec, found
