"""`MixedPrecisionLinear`: a linear layer whose weight stays compressed, in any format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import torch

from ..checkpoint import Checkpoint
from ..errors import ShapeError
from ..formats import label_of
from ..formats.plain import main_name, without_bias
from ..kernels import pack
from .cache import DequantizationCache
from .matrix import CompressedMatrix


class CompressedModule(torch.nn.Module):
    """A module with compressed matrices, which are buffers in their kernels' layout.

    They follow the module between devices and are never cast: `.half()` and `.to(dtype)` leave them as they are.
    """

    def __init__(self, matrices: Sequence[CompressedMatrix], cache: DequantizationCache | None) -> None:
        super().__init__()
        self.matrices, self.cache = tuple(matrices), cache
        self._register()

    def _register(self) -> None:
        for number, matrix in enumerate(self.matrices):
            for name, tensor in matrix.resident.items():
                self.register_buffer(f"matrix_{number}_{name}", tensor)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        for matrix in self.matrices:
            matrix.move(fn(torch.empty(0, device=matrix.device)).device)
        self._buffers.clear()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._register()
        return self


class MixedPrecisionLinear(CompressedModule):
    """y = x · Wᵀ + bias, with W [out_features, in_features] compressed as its checkpoint holds it.

    x [..., in_features] in BF16, FP16 or FP32 -> [..., out_features] in x's dtype. On a CPU the fastest kernel for the
    format runs; on another device the format's reference dequantizes W for every call, unless `cache` keeps it. No
    gradient reaches W; x's does.

    >>> checkpoint = open_checkpoint("Qwen3-8B-AWQ")                                             # doctest: +SKIP
    >>> MixedPrecisionLinear.from_checkpoint(checkpoint, "model.layers.0.self_attn.q_proj")      # doctest: +SKIP
    MixedPrecisionLinear(in_features=4096, out_features=4096, bias=False, format=AWQ int4 g128 asym)
    """

    bias: torch.nn.Parameter | None

    def __init__(
        self, matrix: CompressedMatrix, bias: torch.Tensor | None = None, cache: DequantizationCache | None = None
    ) -> None:
        if len(matrix.format.shape) != 2:
            raise ShapeError(f"a weight of shape {list(matrix.format.shape)}", rule="a linear layer's is [out, in]")
        super().__init__([matrix], cache)
        self.out_features, self.in_features = matrix.format.shape
        self.register_parameter("bias", None if bias is None else torch.nn.Parameter(bias, requires_grad=False))

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, module: str, cache: DequantizationCache | None = None
    ) -> MixedPrecisionLinear:
        """One module of a checkpoint. Raises what `errors` draws below CheckpointError and FormatError."""
        tensors, module_format = checkpoint.read(module), without_bias(checkpoint.format(module))
        kernel, resident = pack(tensors, module_format)
        return cls(CompressedMatrix(kernel, module_format, resident), tensors.get("bias"), cache)

    @property
    def weight(self) -> torch.Tensor:
        """W [out, in], dequantized anew: BF16, or the dtype of a weight that is not quantized."""
        matrix = self.matrices[0]
        if matrix.format.name == "plain":
            return matrix.resident[main_name(matrix.format.parameters.names)]
        return matrix.dequantize(torch.bfloat16)

    @property
    def format(self) -> str:
        """Its format's label, such as `GPTQ int4 g128`."""
        return label_of(self.matrices[0].format)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out]."""
        rows = self.matrices[0].linear(x.reshape(-1, x.shape[-1]), self.bias, self.cache)
        return rows.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """As torch.nn.Linear's, and the format."""
        has_bias = self.bias is not None
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={has_bias}, format={self.format}"
        )
