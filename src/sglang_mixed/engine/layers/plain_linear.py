"""Linear layers in 16 bits on an accelerator: SGLang's method, and our kernel for what is known to be faster on it."""

from __future__ import annotations

import torch
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

from ...formats import ModuleFormat
from ...formats.plain import PlainParameters
from ...kernels.grouped.codec import codec_of
from ...kernels.grouped.table import Weight
from . import decoded

#: Rows up to which it is faster (benchmarks/gpu_linears.py).
FEW_ROWS = 64


class PlainLinear(UnquantizedLinearMethod):
    """The weight stays SGLang's parameter, whoever multiplies by it.

    A router's product for few tokens has too few outputs to fill a GPU, unless its columns are cut too.
    """

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Beside what SGLang does, note where a small weight lies."""
        from ...kernels.grouped.launch import FEW_OUTPUTS
        from ...kernels.grouped.linear import DecodedLinear

        super().process_weights_after_loading(layer)
        self._small: DecodedLinear | None = None
        weight = layer.weight.data
        assert isinstance(weight, torch.Tensor)
        outputs, columns = weight.shape
        is_wished = decoded.is_measured_gpu() and decoded.wishes() == "faster"
        if is_wished and outputs <= FEW_OUTPUTS and weight.dtype.itemsize == 2:
            codec = codec_of(ModuleFormat("plain", PlainParameters("BF16", ("weight",), ()), (outputs, columns)))
            self._small = DecodedLinear(Weight(codec, {"weight": weight}), outputs, columns)
            decoded.tell(f"16-bit weights of up to {FEW_OUTPUTS} outputs", "faster than SGLang's for few tokens")

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., in] -> [..., out]."""
        if (
            self._small is not None
            and x.numel() <= FEW_ROWS * x.shape[-1]
            and x.dtype == layer.weight.dtype
            and not torch.compiler.is_compiling()
        ):
            return self._small.run(x, bias)
        output: torch.Tensor = super().apply(layer, x, bias)
        return output
