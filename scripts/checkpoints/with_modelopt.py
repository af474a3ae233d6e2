"""Quantizes a checkpoint with NVIDIA's ModelOpt: `with_modelopt.py OUT '{"config": "FP8_DEFAULT_CFG"}'`."""

from __future__ import annotations

import shutil
from pathlib import Path

import modelopt.torch.quantization as mtq
import torch
from common import arguments, calibration_ids, finish, report, tensors
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.quantization.qtensor import FP8QTensor, MXFP4QTensor, MXFP8QTensor, NVFP4QTensor
from modelopt.torch.quantization.utils import update_quant_cfg_with_kv_cache_quant
from transformers import AutoModelForCausalLM, AutoTokenizer


def quantize(source: Path, out: Path, config: str, kv_cache: str | None = None) -> None:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    data = calibration_ids(AutoTokenizer.from_pretrained(source), count=8)
    chosen = getattr(mtq, config)
    if kv_cache:
        chosen = update_quant_cfg_with_kv_cache_quant(chosen, getattr(mtq, kv_cache)["quant_cfg"])
    model = mtq.quantize(model, chosen, lambda quantized: [quantized(ids[None]) for ids in data])
    export_hf_checkpoint(model, export_dir=str(out))


def dequantize(state: dict[str, torch.Tensor]) -> torch.Tensor:
    """One module's weight as ModelOpt's own tensors decode it, in float32."""
    weight, scale = state["weight"], state["weight_scale"]
    if weight.dtype == torch.uint8:
        shape = torch.Size((weight.shape[0], weight.shape[1] * 2))
        if "weight_scale_2" in state:
            blocks = {"double_scale": state["weight_scale_2"], "block_sizes": {-1: 16}}
            return NVFP4QTensor(shape, torch.float32, weight).dequantize(torch.float32, scale=scale, **blocks)
        return MXFP4QTensor(shape, torch.float32, weight).dequantize(torch.float32, scale=scale, block_sizes={-1: 32})
    if scale.dtype == torch.uint8:
        return MXFP8QTensor(weight.shape, torch.float32, weight).dequantize(torch.float32, scale=scale)
    whole = {"scale": scale[:, None] if scale.ndim == 1 else scale}
    if scale.ndim == 4:
        whole = {"scale": scale[:, 0, :, 0], "block_sizes": {-1: 128, -2: 128}}
    return FP8QTensor(weight.shape, torch.float32, weight).dequantize(torch.float32, **whole)


def main() -> None:
    args = arguments(__doc__)
    shutil.rmtree(args.out, ignore_errors=True)
    quantize(args.source, args.out, **args.settings)
    finish(args.out)
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors(args.out).items():
        module, _, local = name.rpartition(".")
        modules.setdefault(module, {})[local] = tensor
    report(args.out, lambda module: dequantize(modules[module]), args.reference)


if __name__ == "__main__":
    main()
