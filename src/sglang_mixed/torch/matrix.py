"""One compressed matrix on any device: our kernels on the CPU, the format's reference and a matmul elsewhere."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..formats import ModuleFormat, get_format
from ..kernels import LinearKernel, get_kernel, pack
from .cache import DequantizationCache

#: What the CPU kernels take x in.
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(slots=True, eq=False)
class CompressedMatrix:
    """A weight [out, in] as its kernel keeps it."""

    kernel: LinearKernel
    format: ModuleFormat
    resident: dict[str, torch.Tensor]

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return next(iter(self.resident.values())).device

    def move(self, device: torch.device) -> None:
        """Take it to another device. Elsewhere than on a CPU it lies as in its file: that layout every format knows."""
        if device == self.device:
            return
        if (device.type == "cpu") != (self.device.type == "cpu"):
            files = self.kernel.unpack({name: one.cpu() for name, one in self.resident.items()}, self.format)
            if device.type == "cpu":
                self.kernel, self.resident = pack(files, self.format)
            else:
                self.kernel = get_kernel("chunked")
                self.resident = self.kernel.pack(files, self.format)
        self.resident = {name: tensor.to(device) for name, tensor in self.resident.items()}

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """[out, in] by the format's reference, on the matrix's device."""
        device = self.device
        files = {name: one.to(device) for name, one in self.kernel.unpack(self.resident, self.format).items()}
        return get_format(self.format.name).dequantize(files, self.format.parameters, dtype)

    def linear(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, cache: DequantizationCache | None = None
    ) -> torch.Tensor:
        """x [rows, in] -> [rows, out] in x's dtype, plus a bias [out]."""
        bias = None if bias is None else bias.to(x.dtype)
        if cache is not None and cache.takes(math.prod(self.format.shape) * x.dtype.itemsize):
            return F.linear(x, cache.get((self, x.dtype, x.device), lambda: self.dequantize(x.dtype)), bias)
        has_gradient = x.requires_grad and torch.is_grad_enabled()
        if x.device.type != "cpu" or x.dtype not in KERNEL_DTYPES or has_gradient:
            return F.linear(x, self.dequantize(x.dtype), bias)
        if bias is None:
            return self.kernel.linear(x.contiguous(), self.resident, self.format)
        if self.kernel.takes_bias:
            return self.kernel.linear(x.contiguous(), self.resident, self.format, bias)
        return self.kernel.linear(x.contiguous(), self.resident, self.format) + bias
