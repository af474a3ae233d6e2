"""Quantizes a checkpoint with AutoRound: `with_autoround.py OUT '{"scheme": ..., "format": ...}'`."""

from __future__ import annotations

import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound
from auto_round.compressors.shard_writer import ShardWriter
from auto_round.experimental.qmodules.fp4_utils import unpack_fp4_from_uint8
from auto_round.experimental.qmodules.mx import get_fp_scale
from auto_round.export.export_to_awq.utils import dequantize_gemm
from auto_round.utils.weight_handler import _dequant_fp8_linear_weight
from auto_round_extension.torch.qlinear_torch import QuantLinear
from auto_round_extension.torch.qlinear_torch_zp import QuantLinear as QuantLinearPlusOne
from common import arguments, calibration_ids, decompress, finish, quantization_config, report, tensors
from transformers import AutoTokenizer


def quantize(source: Path, out: Path, format: str, max_shard_size: str | None = None, **settings: Any) -> None:
    if max_shard_size:
        ShardWriter.__init__ = functools.partialmethod(ShardWriter.__init__, max_shard_size=max_shard_size)
    tokenizer = AutoTokenizer.from_pretrained(source)
    data = [ids[None] for ids in calibration_ids(tokenizer)]
    rounder = AutoRound(
        str(source),
        tokenizer,
        dataset=data,
        nsamples=len(data),
        seqlen=data[0].shape[1],
        device_map="cpu",
        enable_torch_compile=False,
        **settings,
    )
    with tempfile.TemporaryDirectory() as folder:
        rounder.quantize_and_save(folder, format=format)
        (result,) = {path.parent for path in Path(folder).rglob("config.json")}
        shutil.copytree(result, out, dirs_exist_ok=True)


def dequantize(out: Path, module: str) -> torch.Tensor:
    """One module's weight as AutoRound's own linear layers read it."""
    config = quantization_config(out)
    state = {name.rpartition(".")[2]: t for name, t in tensors(out).items() if name.startswith(module + ".")}
    if config["quant_method"] == "compressed-tensors" and "weight" not in state:
        return decompress(out, module)
    if "weight_packed" in state:
        return decode_fp4(state)
    if "qweight" not in state:
        scale = state.get("weight_scale", state.get("weight_scale_inv"))
        block = config.get("weight_block_size")
        return _dequant_fp8_linear_weight(state["weight"].float(), scale.float(), block, state["weight"].dtype)
    if state["qweight"].shape[1] != state["scales"].shape[1]:
        group = config["group_size"] if config["group_size"] > 0 else len(state["qweight"])
        return dequantize_gemm(state["qweight"], state["qzeros"], state["scales"].float(), 4, group).T.contiguous()
    rows = state["g_idx"].numel() if "g_idx" in state else state["qweight"].shape[0] * 32 // config["bits"]
    columns = state["qweight"].shape[1]
    group = config["group_size"] if config["group_size"] > 0 else rows
    # Stored as zero - 1, so the tag says; of model-free exports it says so wrongly (see their perplexity).
    one_less = config["quant_method"] == "gptq" or config["packing_format"] == "auto_round:auto_gptq"
    cls = QuantLinearPlusOne if one_less else QuantLinear
    layer = cls(config["bits"], group, rows, columns, bias=False, g_idx="g_idx" in state)
    layer.load_state_dict(state)
    layer.post_init()
    layer.scales = layer.scales.float()
    return layer(torch.eye(rows)).T.contiguous()


def decode_fp4(state: dict[str, torch.Tensor]) -> torch.Tensor:
    """By the parts of AutoRound's FP4 layers that do not round to bfloat16."""
    packed = state["weight_packed"]
    codes = unpack_fp4_from_uint8(packed, len(packed), packed.shape[1] * 2, torch.float32)
    if "weight_global_scale" in state:
        scale = state["weight_scale"].float() / state["weight_global_scale"]
    else:
        scale = get_fp_scale(state["weight_scale"]).float()
    return (codes.unflatten(1, (scale.shape[1], -1)) * scale[..., None]).flatten(1)


def main() -> None:
    args = arguments(__doc__)
    quantize(args.source, args.out, **args.settings)
    finish(args.out)
    report(args.out, lambda module: dequantize(args.out, module), args.reference)


if __name__ == "__main__":
    main()
