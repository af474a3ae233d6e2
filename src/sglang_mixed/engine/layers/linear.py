"""Linear layers on the CPU: each part compressed at rest, neighbouring parts that agree run as one matrix."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.quantization.base_config import LinearMethodBase

from ...errors import ShapeError
from ...plan import PlannedModule
from .. import state
from ..loading.intake import Intake


class CPULinearMethod(LinearMethodBase):
    """SGLang's linear method over our CPU kernels, for one layer whose parts the plan names."""

    def __init__(self, parts: list[PlannedModule]) -> None:
        self._parts = parts
        self.intake = Intake()

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
        """Expect what the plan says; every part must have the shape that the engine asks of this rank."""
        check_shape(self._parts, output_partition_sizes, input_size_per_partition)
        self.intake.open(self._parts)
        # Some models look at the dtype and width of a layer's weight.
        layer.weight = torch.empty(0, input_size_per_partition, dtype=params_dtype)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """The weights were packed as they arrived."""

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., in] -> [..., out]."""
        rows, weights = x.reshape(-1, x.shape[-1]), self.intake.weights
        biases = [None] * len(weights) if bias is None else torch.split(bias, [one.rows for one in weights])
        outputs = [weight.linear(rows, own) for weight, own in zip(weights, biases, strict=True)]
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return output.reshape(*x.shape[:-1], -1)


def check_shape(modules: list[PlannedModule], rows: list[int], columns: int) -> None:
    """Raise ShapeError unless this rank's parts, one above the other, are what the engine's layer has."""
    regions = [state.current_loading().plan.parts[module.name].wanted for module in modules]
    heights = [end - begin for (begin, end), _ in regions]
    widths = {end - begin for _, (begin, end) in regions}
    if widths != {columns} or (heights != rows if len(rows) == len(heights) else sum(heights) != sum(rows)):
        raise ShapeError(
            f"the engine's layer is {rows} x {columns} on this rank, the checkpoint's {heights} x {sorted(widths)}",
            tensor=modules[0].name,
            rule="config.json of the base describes every weight that is served",
            remedy="check that the base's config.json belongs to its weights",
        )
