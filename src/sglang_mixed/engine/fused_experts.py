"""Experts that a checkpoint holds in one tensor a layer, on the CPU: in 16 bits, as the file has them.

SGLang's own plain-torch loop computes them, from views of the file's tensors: their matrices are [in, out] there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput
from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase

from ..checkpoint import join
from ..errors import ShapeError, UnsupportedError
from ..formats import tensor_specs
from ..plan import PlannedModule
from ..plan.families import fused_experts
from . import state
from .file_tensors import FileTensors, StockTensor, file_dtype
from .ledger import Line


@dataclass(frozen=True, slots=True)
class WholePlace:
    """A tensor that is held whole, as its file has it (see `intake.Place`)."""

    tensor: StockTensor

    def destination(self) -> torch.Tensor | None:
        """Itself, unless the engine holds another dtype."""
        return None if self.tensor.is_cast else self.tensor.parameter.data

    def receive(self, tensor: torch.Tensor) -> None:
        """Copy what was not read into place."""
        if tensor.data_ptr() != self.tensor.parameter.data_ptr():
            self.tensor.parameter.data.copy_(tensor)


class WholeTensors(FileTensors):
    """A module's tensors, each a parameter of its name in the file's layout, in the engine's dtype."""

    def __init__(self, module: PlannedModule, dtype: torch.dtype) -> None:
        torch.nn.Module.__init__(self)
        self.tensors = {}
        self._implied = set()
        loading = state.current_loading()
        specs = tensor_specs(module.format)
        for local in module.tensors:
            shape = specs[local].shape
            parameter = torch.nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
            self.register_parameter(local, parameter)
            name = join(module.name, local)
            self.tensors[name] = StockTensor(parameter, (), shape, file_dtype(module.format, local))
            loading.expect(Line(module.name, None, None, local), name, WholePlace(self.tensors[name]))


class FusedExpertsMethod(FusedMoEMethodBase):
    """SGLang's MoE method for a layer whose experts are one module of the checkpoint."""

    runner = None

    def __init__(self, module: PlannedModule, config: Any) -> None:
        self._module, self._config = module, config

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Expect the module's tensors whole; raises ShapeError where this rank has but a part of them."""
        held = fused_experts(self._module.name, self._config)
        names = {*held, *(f"{name}_bias" for name in held)} if extra_weight_attrs.get("with_bias") else set(held)
        if not held or not all(one.transposed for one in held.values()) or names != set(self._module.tensors):
            raise UnsupportedError(
                f"experts are in tensors of their layer ({', '.join(self._module.tensors)}), in no layout known here",
                tensor=self._module.name,
                remedy="map this module to a source that holds every expert by itself",
            )
        files = layer.files = WholeTensors(self._module, params_dtype)
        expected = {
            "gate_up_proj": (num_experts, hidden_size, 2 * intermediate_size_per_partition),
            "down_proj": (num_experts, intermediate_size_per_partition, hidden_size),
        }
        for name, shape in expected.items():
            found = tuple(getattr(files, name).shape)
            if found != shape:
                raise ShapeError(
                    f"the engine's experts are {list(shape)} on this rank, the checkpoint's tensor is {list(found)}",
                    tensor=join(self._module.name, name),
                    rule="experts in tensors of their layer are held whole",
                    remedy="serve with --tp 1 and without --ep",
                )
        layer.w13_weight, layer.w2_weight = (files.get_parameter(name).data.transpose(1, 2) for name in expected)
        if extra_weight_attrs.get("with_bias"):
            layer.w13_weight_bias, layer.w2_weight_bias = files.gate_up_proj_bias.data, files.down_proj_bias.data

    def create_moe_runner(self, layer: torch.nn.Module, moe_runner_config: Any) -> None:
        """There is no runner: `apply` computes."""
        self.moe_runner_config = moe_runner_config

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """The file's layout stays."""

    def apply(self, layer: torch.nn.Module, dispatch_output: Any) -> StandardCombineInput:
        """Hidden states [tokens, hidden] and their top-k experts -> weighted sums [tokens, hidden]."""
        from sglang.srt.layers.moe.fused_moe_native import moe_forward_native

        output = moe_forward_native(
            layer, dispatch_output.hidden_states, dispatch_output.topk_output, self.moe_runner_config
        )
        return StandardCombineInput(hidden_states=output)
