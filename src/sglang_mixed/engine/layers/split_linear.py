"""Linear layers on an accelerator whose parts are stored differently: one of SGLang's methods per run of parts.

Neighbouring parts that agree stay one matrix. Each run costs a kernel launch, and all but the first a concatenation.
What SGLang has no method for, or a slower one, runs on our own kernel (`decoded.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization.base_config import LinearMethodBase

from ...errors import EngineError
from ...formats.fusion import fuse
from ...plan import PlannedModule
from ...plan.fused import are_alike
from .. import state
from ..loading.file_tensors import Converted, FileTensors
from ..loading.kernel_builds import Kernel
from .decoded import DecodedRun
from .linear import check_shape
from .linear_methods import LinearRecipe, compiled, needs_decoding, recipe_for


class LinearRun(Converted):
    """Neighbouring parts that run as one matrix, by one of SGLang's own methods."""

    def __init__(self, parts: Sequence[PlannedModule], sizes: list[int], dtype: torch.dtype) -> None:
        super().__init__()
        planned = state.current_loading().plan.parts
        self._sizes, self._dtype, self.parts = sizes, dtype, parts
        self._columns = planned[parts[0].name].format.shape[1]
        self._whole_columns = parts[0].format.shape[1]
        self._recipe: LinearRecipe = recipe_for(parts[0].format)
        self.file_tensors = FileTensors([parts], [planned[part.name].held for part in parts], dtype)
        # What SGLang's methods put their parameters on. Its loader must not find a method here: `convert` calls it.
        self.matrix = LinearBase(self._columns, sum(sizes), params_dtype=dtype)
        self.matrix.quant_method = None

    @property
    def compiled(self) -> set[Kernel]:
        """What SGLang compiles for this run."""
        return compiled(self.parts[0].format, self._dtype)

    def convert(self) -> None:
        """The files' layout gives way to the method's."""
        files = self.file_tensors.take()
        device = next(iter(files.values())).device
        found = self._recipe.convert(files, self.parts[0].format, self._sizes, self._dtype)
        if "input_scale" in files:  # planned and proven, but per-token scales replace it
            self.adopt({"input_scale": files["input_scale"]})
        method, matrix = self._recipe.method(self.matrix), self.matrix
        with torch.device(device):
            method.create_weights(
                matrix,
                input_size_per_partition=self._columns,
                output_partition_sizes=self._sizes,
                input_size=self._whole_columns,
                output_size=sum(self._sizes),
                params_dtype=self._dtype,
                weight_loader=_never_called,
                **self._recipe.arguments,
            )
        for name, parameter in matrix.named_parameters():
            if name in found:
                parameter.data.copy_(found.pop(name).reshape(parameter.shape))
            else:
                parameter.data.zero_()
        if found:
            raise EngineError(f"SGLang's method takes no {', '.join(found)}", tensor=self.parts[0].name)
        method.process_weights_after_loading(matrix)
        self.method = method
        self.note_padding()

    def run(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., in] -> [..., out of these parts]."""
        output: torch.Tensor = self.method.apply(self.matrix, x, bias)
        return output


class SplitLinear(LinearMethodBase):
    """SGLang's linear method for a layer whose parts are each stored in a format of its own."""

    def __init__(self, parts: list[PlannedModule]) -> None:
        self._parts = parts
        self.runs: list[LinearRun | DecodedRun] = []

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """One child module a run, in which every part's tensors have their places; the bias stays the layer's."""
        check_shape(self._parts, output_partition_sizes, input_size_per_partition)
        for begin, end in runs_of(self._parts):
            parts = self._parts[begin:end]
            rows = [_rows(part) for part in parts]
            if needs_decoding(parts, rows):
                self.runs += [DecodedRun(some, params_dtype) for some in _decoded_together(parts)]
            else:
                self.runs.append(LinearRun(parts, rows, params_dtype))
        for number, run in enumerate(self.runs):
            layer.add_module(f"run_{number}", run)
        # Some models look at the dtype of a layer's weight.
        layer.weight = torch.empty(0, dtype=params_dtype)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Every run into its method's layout."""
        for run in self.runs:
            run.convert()

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., in] -> [..., out]."""
        if len(self.runs) == 1:
            return self.runs[0].run(x, bias)
        output = torch.cat([run.run(x) for run in self.runs], dim=-1)
        return output if bias is None else output + bias


def runs_of(parts: Sequence[PlannedModule]) -> Iterator[tuple[int, int]]:
    """[begin, end) of neighbouring parts that can be one matrix on this rank."""
    planned = state.current_loading().plan.parts
    formats = [planned[part.name].format for part in parts]
    begin = 0
    for end in range(1, len(parts) + 1):
        alike = end < len(parts) and are_alike(parts[begin].format, parts[end].format)
        # A tensor's one scale becomes one a row.
        joins = alike and (_is_by_tensor(parts[begin]) or fuse(formats[begin : end + 1]))
        if not joins:
            yield begin, end
            begin = end


def _decoded_together(parts: Sequence[PlannedModule]) -> list[Sequence[PlannedModule]]:
    planned = [state.current_loading().plan.parts[part.name] for part in parts]
    is_one = all(part.is_exact for part in planned) and fuse([part.format for part in planned])
    return [parts] if is_one else [[part] for part in parts]


def _is_by_tensor(part: PlannedModule) -> bool:
    return getattr(part.format.parameters, "granularity", None) == "tensor"


def _rows(part: PlannedModule) -> int:
    begin, end = state.current_loading().plan.parts[part.name].wanted.rows
    return end - begin


def _never_called(*args: Any, **kwargs: Any) -> None:
    raise EngineError("SGLang's loader was handed a weight that arrives by its checkpoint name")
