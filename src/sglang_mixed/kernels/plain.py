"""Unquantized weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from ..formats import ModuleFormat
from ..formats.plain import main_name
from .base import FileLayout
from .panels import linear_by_panels


class Plain(FileLayout):
    """BF16, FP16 and FP32 matrices as they are in the file."""

    name = "plain"
    takes_bias = True

    def takes(self, format: ModuleFormat) -> bool:
        """Plain matrices [out, in]."""
        return format.name == "plain" and len(format.shape) == 2

    def linear(
        self,
        x: torch.Tensor,
        resident: Mapping[str, torch.Tensor],
        format: ModuleFormat,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """F.linear; where the dtypes differ the wider one decides, a strip of W at a time."""
        weight = resident[main_name(format.parameters.names)]
        if weight.dtype == x.dtype:
            return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
        if weight.dtype == torch.float32:
            return F.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)

        def decode(start: int, stop: int, target: torch.Tensor) -> None:
            # By way of float32: torch's direct FP16 -> BF16 copy is scalar, twice as slow as the two vector ones.
            target.copy_(weight[start:stop].float())

        return linear_by_panels(x, format.shape, decode, bias=bias)
