"""MoE layers on an accelerator: one fused kernel per group of experts that are stored alike, outputs summed.

Each group sees all tokens, with the ids of other groups' experts replaced by -1: shapes do not depend on the routing,
nothing waits for the device, and CUDA graphs capture it as they capture SGLang's own layers. Experts that SGLang has no
kernel for are one group more, whatever their formats, on our own kernel (`decoded.py`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from sglang.srt.layers.moe.moe_runner import MoeRunner
from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput, StandardDispatchOutput
from sglang.srt.layers.moe.topk import TopKOutputChecker
from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase

from ...errors import UnsupportedError
from ...formats import label_of
from ...formats.slicing import Range, Region
from ...plan import PlannedModule
from ...plan.fold import fold
from ...plan.fused import are_alike
from .. import state
from ..loading.file_tensors import Converted, FileTensors
from ..loading.kernel_builds import Kernel
from . import decoded
from .decoded import DecodedExperts, tell, wishes
from .expert_kernels import KERNELS, ExpertFormats, ExpertKernel, unit
from .moe import ExpertModules, check_experts

REMEDY = "map these experts to a source in another format, or serve on the CPU"
ONE_LAUNCH = "one launch for all formats of a layer"
#: What runs a group.
Kind = Callable[[Sequence[ExpertModules], list[int], torch.dtype], "ExpertGroup | DecodedExperts"]


class ExpertGroup(Converted):
    """Experts that are stored alike. `numbers` are their places among this rank's experts."""

    def __init__(self, experts: Sequence[ExpertModules], numbers: list[int], dtype: torch.dtype) -> None:
        super().__init__()
        gate, _, down = experts[0]
        self.formats = ExpertFormats(gate.format, down.format)
        kernel = choose_kernel(experts)
        assert kernel is not None
        self.kernel, self.numbers, self._dtype = kernel, numbers, dtype
        (begin, end), room = _share(down), _room(experts[0], self.formats, self.kernel)
        self._kept: Range = (begin - room[0], end - room[0])
        hidden = (0, down.format.shape[0])
        matrices = [[gate, up] for gate, up, _ in experts]
        self.w13 = FileTensors(matrices, [Region(room, hidden)] * 2, dtype)
        self.w2 = FileTensors([[down] for _, _, down in experts], [Region(hidden, room)], dtype)
        self.runner: MoeRunner | None = None
        self._has_others = True

    @property
    def compiled(self) -> set[Kernel]:
        """What SGLang compiles for this group."""
        return self.kernel.compiled(self.formats, self._dtype, self._has_others)

    def create_runner(self, config: Any, num_experts: int) -> None:
        """SGLang's runner for this group, of `num_experts` on this rank."""
        own = dataclasses.replace(config, num_local_experts=len(self.numbers), inplace=False)
        self._has_others = config.num_experts != len(self.numbers)
        assert self._has_others or num_experts == len(self.numbers)
        self.runner = MoeRunner(self.kernel.backend, own)

    def prepare(self) -> None:
        """The files' layout gives way to the kernel's."""
        self.adopt(self.kernel.prepare(self.w13.take(), self.w2.take(), self.formats, self._kept, self._dtype))
        self.note_padding()
        tensors = dict(self.named_parameters(recurse=False))
        self._info = self.kernel.quant_info(tensors, self.formats, self._has_others)

    def run(self, dispatch_output: StandardDispatchOutput, ids: torch.Tensor) -> torch.Tensor:
        """Weighted sums [tokens, hidden] over this group's experts; ids [tokens, top-k] count within it or are -1."""
        assert self.runner is not None
        topk_output = dispatch_output.topk_output._replace(topk_ids=ids)
        own = StandardDispatchOutput(dispatch_output.hidden_states, None, topk_output)
        output: torch.Tensor = self.runner.run(own, self._info).hidden_states
        return output


class MixedMoE(FusedMoEMethodBase):
    """SGLang's MoE method for a layer any of whose experts may be stored in any format."""

    def __init__(self, prefix: str, experts: Sequence[ExpertModules]) -> None:
        self._prefix, self._experts = prefix, experts
        self.runner = None
        self.groups: list[ExpertGroup | DecodedExperts] = []

    def create_weights(
        self,
        layer: torch.nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """One child module a group, in which every local expert's tensors have their places."""
        check_experts(self._prefix, self._experts, num_experts, bool(extra_weight_attrs.get("with_bias")))
        ids = torch.full((0, num_experts + 1), -1, dtype=torch.int32)
        for number, (kind, members) in enumerate(share_out(self._experts)):
            group = kind([self._experts[member] for member in members], members, params_dtype)
            row = torch.full((1, num_experts + 1), -1, dtype=torch.int32)
            row[0, members] = torch.arange(len(members), dtype=torch.int32)
            ids = torch.cat([ids, row])
            self.groups.append(group)
            layer.add_module(f"group_{number}", group)
        # [groups, experts + 1]: an expert's number in the group or -1; the last column is where -1 looks.
        layer.register_buffer("ids_in_groups", ids, persistent=False)

    def create_moe_runner(self, layer: torch.nn.Module, moe_runner_config: Any) -> None:
        """One runner a group."""
        check_activation(self._prefix, self.groups, moe_runner_config)
        for group in self.groups:
            group.create_runner(moe_runner_config, len(self._experts))

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Every group into its kernel's layout."""
        for group in self.groups:
            group.prepare()

    def apply(self, layer: torch.nn.Module, dispatch_output: Any) -> StandardCombineInput:
        """Hidden states [tokens, hidden] and their top-k experts -> weighted sums [tokens, hidden]."""
        topk_output = dispatch_output.topk_output
        assert TopKOutputChecker.format_is_standard(topk_output)
        ids = topk_output.topk_ids
        if len(self.groups) == 1:  # it holds all of this rank's experts, in order
            return StandardCombineInput(self.groups[0].run(dispatch_output, ids))
        in_groups = layer.get_buffer("ids_in_groups")[:, ids]  # -1 looks into the last column
        output = self.groups[0].run(dispatch_output, in_groups[0])
        for group, own in zip(self.groups[1:], in_groups[1:], strict=True):
            more = group.run(dispatch_output, own)
            assert more.data_ptr() != output.data_ptr() or not len(more), "SGLang gave two groups one output"
            output += more
        return StandardCombineInput(output)


def group_experts(experts: Sequence[ExpertModules]) -> list[list[int]]:
    """Places of experts that are stored alike, whatever their sources; groups by their first members."""
    groups: list[list[int]] = []
    for number, expert in enumerate(experts):
        for group in groups:
            if all(are_alike(a.format, b.format) for a, b in zip(experts[group[0]], expert, strict=True)):
                group.append(number)
                break
        else:
            groups.append([number])
    return groups


def share_out(experts: Sequence[ExpertModules]) -> list[tuple[Kind, list[int]]]:
    """Groups of experts and what runs each; all experts are in one. Raises UnsupportedError where nothing can."""
    groups, parts = group_experts(experts), state.current_loading().plan.parts
    # SGLang's kernels of compressed formats add no biases.
    biased = any(module.bias for expert in experts for module in expert)
    mixes = ONE_LAUNCH if wishes() != "needed" and len(groups) > 1 else None
    found: list[tuple[Kind, list[int]]] = []
    rest: list[int] = []
    for members in groups:
        alike = [experts[member] for member in members]
        wish = mixes or decoded.why_wished([parts[module.name].format for module in alike[0]])
        if biased or choose_kernel(alike) is None or (wish and is_decoded(alike)):
            check_decoded(alike, wish or ONE_LAUNCH)
            rest += members
        else:
            found.append((ExpertGroup, members))
    return [*found, (DecodedExperts, sorted(rest))] if rest else found


def choose_kernel(experts: Sequence[ExpertModules]) -> ExpertKernel | None:
    """SGLang's kernel for these experts, which are stored alike; None where it has none."""
    gate, up, down = experts[0]
    formats = ExpertFormats(gate.format, down.format)
    alike = are_alike(gate.format, up.format)
    return next((kernel for kernel in KERNELS if alike and kernel.why_not(formats) is None), None)


def is_decoded(experts: Sequence[ExpertModules]) -> bool:
    """Whether our own kernel reads the formats of these experts, which are stored alike."""
    return all(decoded.why_not(module.format) is None for module in experts[0])


def check_decoded(experts: Sequence[ExpertModules], wish: str) -> None:
    """Say why our own kernel runs these experts, stored alike: by a wish, if SGLang has a kernel for them.

    Raises UnsupportedError where it cannot.
    """
    gate, up, down = experts[0]
    formats = ExpertFormats(gate.format, down.format)
    labels = ", ".join(dict.fromkeys(label_of(one.format) for one in experts[0]))
    why = [f"{kernel.backend.value}: {reason}" for kernel in KERNELS if (reason := kernel.why_not(formats))]
    if not are_alike(gate.format, up.format):
        why = ["SGLang's kernels read gate and up as one matrix"]
    if reasons := [reason for one in experts[0] if (reason := decoded.why_not(one.format))]:
        raise UnsupportedError(
            f"no kernel runs experts of {labels} (gate, up and down)",
            tensor=", ".join(fold(module.name for expert in experts for module in expert)),
            rule="; ".join(dict.fromkeys(why + reasons)),
            remedy=REMEDY,
        )
    tell(f"experts of {labels}", "; ".join(why) or wish)


def check_activation(prefix: str, groups: Sequence[ExpertGroup | DecodedExperts], config: Any) -> None:
    """Raise UnsupportedError where a group's kernel does not compute what the model asks for."""
    needed = [key for key in ("no_combine", "apply_router_weight_on_input") if getattr(config, key, False)]
    marlin = any(isinstance(group, ExpertGroup) and group.kernel.backend.is_marlin() for group in groups)
    activations = ("silu",) if marlin else ("silu", "gelu")
    if needed or not config.is_gated or config.activation not in activations:
        raise UnsupportedError(
            f"this model's experts need {', '.join(needed) or f'{config.activation} (gated: {config.is_gated})'}",
            tensor=prefix,
            rule="groups of experts are gated and add up; Marlin computes SiLU only, others GELU and GPT-OSS's as well",
            remedy="map all experts of the layer to one 16-bit source",
        )


def _share(down: PlannedModule) -> Range:
    return state.current_loading().plan.parts[down.name].wanted.columns


def _room(expert: ExpertModules, formats: ExpertFormats, kernel: ExpertKernel) -> Range:
    """The intermediate range this rank computes: its share, widened to whole units, its width to whole tiles."""
    gate, up, down = (state.current_loading().plan.parts[module.name].held for module in expert)
    ranges, step = (gate.rows, up.rows, down.columns), unit(formats)
    begin = min(begin for begin, _ in ranges) // step * step
    tile = math.lcm(step, kernel.width)
    width = -(-(max(end for _, end in ranges) - begin) // tile) * tile
    return begin, begin + width
