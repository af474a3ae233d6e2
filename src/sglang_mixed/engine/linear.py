"""Linear layers on the CPU: each part compressed at rest, parts that agree run as one matrix."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.quantization.base_config import LinearMethodBase

from ..errors import ShapeError, UnsupportedError
from ..plan import PlannedModule
from .intake import Intake
from .ledger import Ledger


class CPULinearMethod(LinearMethodBase):
    """SGLang's linear method over our CPU kernels, for one layer whose parts the plan names."""

    def __init__(self, prefix: str, parts: list[tuple[str | int | None, PlannedModule]], ledger: Ledger) -> None:
        self._parts = parts
        self.intake = Intake(prefix, ledger)

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
        """Register placeholders for what the plan says; every part must have the shape the engine asks for."""
        if input_size_per_partition != input_size or sum(output_partition_sizes) != output_size:
            raise UnsupportedError(
                "tensor parallelism is not available on the CPU yet",
                tensor=self.intake.prefix,
                remedy="start with --tp-size 1",
            )
        for (_, module), rows in zip(self._parts, output_partition_sizes, strict=True):
            if module.format.shape != (rows, input_size):
                raise ShapeError(
                    f"the engine's layer is {[rows, input_size]}, the checkpoint's {list(module.format.shape)}",
                    tensor=module.name,
                    rule="config.json of the base describes every weight that is served",
                )
        self.intake.open([(shard, None, module) for shard, module in self._parts])
        self.intake.register(layer)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """The weights were packed as they arrived."""
        self.intake.finish(layer)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., in] -> [..., out]."""
        rows = x.reshape(-1, x.shape[-1])
        outputs = [weight.linear(rows) for weight in self.intake.weights]
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        if bias is not None:
            output = output + bias
        return output.reshape(*x.shape[:-1], -1)
