"""Packs a checkpoint with compressed-tensors and a g_idx: `with_compressedtensors.py OUT '{"num_bits": 4, ...}'`.

No released quantizer writes act-order files any more; those that users have came from GPTQ in llm-compressor and this
library, which alone is used here: columns are ordered by their norm and rounded to the nearest.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from common import arguments, decompress, finish, report, tensors, write_json
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file


def quantize(source: Path, out: Path, **settings: Any) -> None:
    weights = QuantizationArgs(strategy="group", actorder="group", **settings)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    written: dict[str, torch.Tensor] = {}
    for name, weight in tensors(source).items():
        module, _, local = name.rpartition(".")
        packed = pack(weight, scheme) if module.endswith("_proj") else {local: weight}
        written |= {f"{module}.{one}": tensor.contiguous() for one, tensor in packed.items()}
    out.mkdir(parents=True, exist_ok=True)
    save_file(written, out / "model.safetensors")
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, format="pack-quantized", ignore=["lm_head", "re:.*mlp.gate$"]
    )
    described = json.loads((source / "config.json").read_text())
    write_json(out / "config.json", {**described, "quantization_config": config.model_dump(mode="json")})


def pack(weight: torch.Tensor, scheme: QuantizationScheme) -> dict[str, torch.Tensor]:
    weights = scheme.weights
    order = torch.argsort(weight.float().norm(dim=0), descending=True)
    groups = weight[:, order].unflatten(1, (-1, weights.group_size))
    scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), weights)
    g_idx = torch.empty_like(order, dtype=torch.int32)
    g_idx[order] = torch.arange(len(order), dtype=torch.int32) // weights.group_size
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero_point, "weight_g_idx": g_idx}
    return PackedQuantizationCompressor.compress(state, scheme)


def main() -> None:
    args = arguments(__doc__)
    shutil.rmtree(args.out, ignore_errors=True)
    quantize(args.source, args.out, **args.settings)
    finish(args.out)
    report(args.out, lambda module: decompress(args.out, module), args.reference)


if __name__ == "__main__":
    main()
