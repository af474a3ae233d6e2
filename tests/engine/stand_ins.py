"""In place of what only a GPU runs: float64 on the very tensors that SGLang's runners and linear methods are given.

SGLang's repacking for Marlin is left out: its input, GPTQ's or AWQ's layout, is what is computed with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.layers.moe.moe_runner.base import MoeRunnerConfig
from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput, StandardDispatchOutput

from sglang_mixed.engine.layers import expert_kernels, grouped_moe
from sglang_mixed.engine.layers.split_linear import LinearRun
from sglang_mixed.formats.awq import unpack_columns
from sglang_mixed.formats.gptq import unpack

#: `monkeypatch.setattr`, or plain `setattr`.
Replace = Callable[[Any, str, Any], None]


def replace_expert_kernels(replace: Replace) -> None:
    """Stand-ins for SGLang's MoE runners and its repacking."""
    replace(grouped_moe, "MoeRunner", StandInRunner)
    replace(expert_kernels, "_repack", lambda source, bits: source)


def replace_linear_kernels(replace: Replace) -> None:
    """SGLang believes in an H100; its methods leave their parameters as they were filled, and float64 computes."""
    from sglang.srt.layers.quantization import fp8, marlin_utils, w8a8_fp8, w8a8_int8
    from sglang.srt.layers.quantization.awq import AWQLinearMethod
    from sglang.srt.layers.quantization.gptq import GPTQMarlinLinearMethod

    replace(marlin_utils, "get_device_capability", lambda: (9, 0))
    for kind in (
        fp8.Fp8LinearMethod,
        w8a8_fp8.W8A8Fp8LinearMethod,
        w8a8_int8.W8A8Int8LinearMethod,
        GPTQMarlinLinearMethod,
        AWQLinearMethod,
    ):
        replace(kind, "process_weights_after_loading", lambda self, layer: None)
    replace(LinearRun, "run", _run)


def _run(self: LinearRun, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    output = x.double() @ decoded(self).T
    return (output if bias is None else output + bias.double()).to(x.dtype)


class StandInRunner:
    """SGLang's `MoeRunner`, in float64, on what it is given."""

    def __init__(self, backend: Any, config: MoeRunnerConfig) -> None:
        self.backend, self.config = backend, config

    def run(self, dispatch_output: StandardDispatchOutput, info: Any) -> StandardCombineInput:
        weights, ids, _ = dispatch_output.topk_output
        x = dispatch_output.hidden_states.double()
        filters = info.expert_map is not None if self.backend.is_marlin() else self._filters
        assert filters or (ids >= 0).all(), "a kernel that was not told would run expert -1"
        assert ids.is_contiguous() and not self.config.inplace
        read = marlin_weight if self.backend.is_marlin() else triton_weight
        w13, w2 = read(info, "w13"), read(info, "w2")
        output = torch.zeros_like(x)
        for token, slot in ((ids >= 0).nonzero()).tolist():
            expert = ids[token, slot]
            gate, up = (w13[expert] @ x[token]).chunk(2)
            output[token] += weights[token, slot].double() * (w2[expert] @ (torch.nn.functional.silu(gate) * up))
        return StandardCombineInput(output)

    @property
    def _filters(self) -> bool:
        return self.config.num_experts != self.config.num_local_experts


def triton_weight(info: Any, side: str) -> torch.Tensor:
    weight, scale = getattr(info, f"{side}_weight").double(), getattr(info, f"{side}_scale")
    if scale is None:
        return weight
    assert scale.dtype == torch.float32 and scale.dim() == 3
    if info.block_shape:
        rows, columns = info.block_shape
        assert scale.shape[1:] == (weight.shape[1] // rows, weight.shape[2] // columns), "blocks must be whole"
        return weight * scale.double().repeat_interleave(rows, 1).repeat_interleave(columns, 2)
    assert info.per_channel_quant or info.use_int8_w8a16
    return weight * scale.double()


def marlin_weight(info: Any, side: str) -> torch.Tensor:
    qweight, scales = getattr(info, f"{side}_qweight"), getattr(info, f"{side}_scales").double()
    zeros = getattr(info, f"{side}_qzeros")
    if zeros is None:
        codes = torch.stack([unpack(one, info.weight_bits) for one in qweight]).double() - 2 ** (info.weight_bits - 1)
        offsets = torch.zeros_like(scales)
    else:
        codes, offsets = unpack_columns(qweight).double(), unpack_columns(zeros).double()
    number, columns, _ = codes.shape
    assert columns % 64 == 0
    groups = (torch.arange(columns) // (columns // scales.shape[1])).expand(number, -1)
    g_idx = getattr(info, f"{side}_g_idx")
    if g_idx.numel():
        groups = g_idx.long()
    index = groups.unsqueeze(2).expand(-1, -1, scales.shape[2])
    return ((codes - offsets.gather(1, index)) * scales.gather(1, index)).transpose(1, 2)


def decoded(run: LinearRun) -> torch.Tensor:
    """float64 [out, in] of what SGLang's method holds."""
    p = {name: parameter.data for name, parameter in run.matrix.named_parameters()}
    if "qweight" not in p:
        weight, scale = p["weight"].double(), p.get("weight_scale", p.get("weight_scale_inv"))
        if scale is None:
            return weight
        if "weight_scale_inv" in p:
            rows, columns = run.method.quant_config.weight_block_size
            scale = scale.repeat_interleave(rows, 0)[: len(weight)].repeat_interleave(columns, 1)[:, : weight.shape[1]]
        return weight * scale.double()
    bits = run.method.quant_config.weight_bits
    if type(run.method).__name__.startswith("AWQ"):
        codes, zeros = unpack_columns(p["qweight"]).double(), unpack_columns(p["qzeros"]).double()
    else:
        codes, zeros = unpack(p["qweight"], bits).double(), torch.full_like(p["scales"], 2 ** (bits - 1)).double()
    size = len(codes) // len(zeros)
    groups = (
        p["g_idx"].long() if run.method.quant_config.full_config.get("desc_act") else torch.arange(len(codes)) // size
    )
    return ((codes - zeros[groups]) * p["scales"].double()[groups]).T
