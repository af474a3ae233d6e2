"""Quantizes a checkpoint with GPTQModel: `with_gptqmodel.py OUT '{"bits": 4, ...}'`."""

from __future__ import annotations

import os

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

from pathlib import Path
from typing import Any

import torch
from common import arguments, calibration_ids, finish, quantization_config, report
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.quantization.config import FP8Config
from transformers import AutoTokenizer


def quantize(source: Path, out: Path, kind: str = "gptq", max_shard_size: str | None = None, **settings: Any) -> None:
    config = FP8Config(**settings) if kind == "fp8" else QuantizeConfig(offload_to_disk=False, **settings)
    model = GPTQModel.load(str(source), config, device="cpu")
    ids = calibration_ids(AutoTokenizer.from_pretrained(source))
    model.quantize([{"input_ids": i[None], "attention_mask": torch.ones_like(i)[None]} for i in ids], batch_size=8)
    model.save(str(out), max_shard_size=max_shard_size)


def dequantized(out: Path) -> dict[str, torch.Tensor]:
    """Every quantized module's weight as GPTQModel's plain torch layers read it."""
    # The scales must keep the precision of the file: float16 for GPTQ, float32 for FP8.
    dtype = torch.float32 if quantization_config(out)["quant_method"] == "fp8" else torch.float16
    model = GPTQModel.load(str(out), device="cpu", backend=BACKEND.TORCH, dtype=dtype)
    result = {}
    for name, module in model.model.named_modules():
        if hasattr(module, "dequantize_weight"):
            if hasattr(module, "scales"):
                module.scales = module.scales.float()
            result[name] = module.dequantize_weight().T.float().contiguous()
    return result


def main() -> None:
    args = arguments(__doc__)
    quantize(args.source, args.out, **args.settings)
    finish(args.out)
    report(args.out, dequantized(args.out).__getitem__, args.reference)


if __name__ == "__main__":
    main()
