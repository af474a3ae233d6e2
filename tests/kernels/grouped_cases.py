"""Weights of every format as the grouped Triton kernels hold them, each with its float64 reference."""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sglang_mixed.formats import detect
from sglang_mixed.formats.slicing import Region, cut, rebase, tensor_ranges, whole, widen
from sglang_mixed.kernels.grouped.arrange import arrange
from sglang_mixed.kernels.grouped.codec import codec_of
from sglang_mixed.kernels.grouped.table import Weight

sys.path.append(str(Path(__file__).parents[1] / "formats"))
import packers

#: Where weights are: on a GPU if there is one and kernels are not interpreted.
DEVICE = "cuda" if torch.cuda.is_available() and not os.environ.get("TRITON_INTERPRET") else "cpu"
Build = Callable[[np.random.Generator, int, int], packers.Packed]


def blocks(rows: int, columns: int, **options: Any) -> Build:
    config = {"quant_method": "fp8", "weight_block_size": [rows, columns], "activation_scheme": "dynamic"}
    config |= options.pop("config", {})
    return lambda rng, out, inner: packers.eight_bit(
        rng,
        (out, inner),
        (rows, columns),
        (-(-out // rows), -(-inner // columns)),
        config,
        name="weight_scale_inv",
        **options,
    )


def eight_bit(kind: str, strategy: str, **options: Any) -> Build:
    weights = {"num_bits": 8, "type": kind, "strategy": strategy, "symmetric": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": []}

    def build(rng: np.random.Generator, out: int, inner: int) -> packers.Packed:
        block, shape = ((1, inner), (out, 1)) if strategy == "channel" else ((out, inner), (1,))
        return packers.eight_bit(rng, (out, inner), block, shape, config, integer=kind == "int", **options)

    return build


def of(packer: Callable[..., packers.Packed], **options: Any) -> Build:
    return lambda rng, out, inner: packer(rng, out, inner, **options)


#: name -> a weight [out, in] as some quantizer writes it; of every format and of every way the kernels read one.
FORMATS: dict[str, Build] = {
    "plain": lambda rng, out, inner: packers.plain(rng, (out, inner), torch.float16),
    "fp8 128x128": blocks(128, 128),
    "fp8 64x64 bf16": blocks(64, 64, scale_dtype=torch.bfloat16),
    "fp8 48x32": blocks(48, 32),
    "fp8 128x128 e8m0": blocks(128, 128, scale_dtype=torch.float8_e8m0fnu, config={"scale_fmt": "ue8m0"}),
    "mxfp8": blocks(1, 32, scale_dtype=torch.float8_e8m0fnu, config={"scale_fmt": "ue8m0"}),
    "fp8 inverse": blocks(64, 64, inverse=True, config={"weight_scale_semantics": "inverse"}),
    "fp8 channel": eight_bit("float", "channel", scale_dtype=torch.bfloat16),
    "fp8 tensor": eight_bit("float", "tensor"),
    "int8 channel": eight_bit("int", "channel"),
    "int8 tensor": eight_bit("int", "tensor", scale_dtype=torch.float16),
    "gptq": of(packers.gptq),
    "gptq g128 v2": of(packers.gptq, group=128, version=2, scale_dtype=torch.bfloat16),
    "gptq row": of(packers.gptq, group=-1, order="none"),
    "gptq asymmetric": of(packers.gptq, sym=False),
    "gptq act-order": of(packers.gptq, order="act", scale_dtype=torch.float32),
    "gptq asymmetric act-order": of(packers.gptq, order="act", sym=False, group=64, version=2),
    "gptq 2": of(packers.gptq, bits=2),
    "gptq 3 asymmetric": of(packers.gptq, bits=3, sym=False),
    "gptq 3 act-order": of(packers.gptq, bits=3, order="act"),
    "gptq 8": of(packers.gptq, bits=8),
    "gptq 8 asymmetric act-order": of(packers.gptq, bits=8, sym=False, order="act"),
    "awq": of(packers.awq),
    "awq g64": of(packers.awq, group=64, scale_dtype=torch.bfloat16),
    "packed": of(packers.packed),
    "packed g16": of(packers.packed, group=16),
    "packed asymmetric": of(packers.packed, sym=False),
    "packed tensor": of(packers.packed, strategy="tensor"),
    "packed 5": of(packers.packed, bits=5),
    "packed 6 asymmetric": of(packers.packed, bits=6, sym=False, strategy="channel"),
    "packed 7": of(packers.packed, bits=7),
    "packed 8 tensor asymmetric": of(packers.packed, bits=8, sym=False, strategy="tensor"),
    "packed 8 asymmetric": of(packers.packed, bits=8, sym=False, group=64),
    "packed act-order": of(packers.packed, act_order=True),
    "nvfp4": of(packers.nvfp4),
    "nvfp4 modelopt": of(packers.nvfp4, modelopt=True),
    "mxfp4": lambda rng, out, inner: tame(packers.mxfp4(rng, out, inner)),
}
#: Scales of the whole weight before those of its parts.
SCALES = ("weight_global_scale", "weight_scale_2", "scales", "weight_scale", "weight_scale_inv")


def tame(packed: packers.Packed) -> packers.Packed:
    """MXFP4 with exponents as near to each other as real weights have them."""
    stored = packed.tensors["weight_scale"].to(torch.int32)
    exponents = stored % 8 + 118
    factor = packers.spread(2.0 ** (exponents - stored).double().numpy(), (1, 32), packed.reference.shape)
    tensors = {**packed.tensors, "weight_scale": exponents.to(torch.uint8)}
    return packers.Packed(tensors, packed.reference * factor, packed.config)


def of_one_size(packed: packers.Packed) -> packers.Packed:
    """With scales shifted by a power of two to a standard deviation near 1/8: one format must not hide another."""
    power = round(-3 - float(np.log2(packed.reference.std())))
    tensors = dict(packed.tensors)
    name = next((one for one in SCALES if one in tensors), "weight")
    scale, shift = tensors[name], -power if divides(packed) else power
    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        tensors[name] = (scale.view(torch.uint8).to(torch.int32) + shift).to(torch.uint8).view(scale.dtype)
    else:
        tensors[name] = (scale.double() * 2.0**shift).to(scale.dtype)
    return packers.Packed(tensors, packed.reference * 2.0**power, packed.config)


def divides(packed: packers.Packed) -> bool:
    return "weight_scale_semantics" in packed.config or "weight_global_scale" in packed.tensors


def generator(*words: object) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(repr(words).encode()))


def weight(
    name: str, rng: np.random.Generator, shape: tuple[int, int], wanted: Region | None = None
) -> tuple[Weight, np.ndarray]:
    """A weight as the kernels hold it, or `wanted` of it, and its float64 reference."""
    packed = of_one_size(FORMATS[name](rng, *shape))
    module_format = detect("weight", packed.infos, packed.config)
    assert module_format is not None
    region = wanted or whole(shape)
    held = widen(module_format, region)
    tensors, ranges = {}, tensor_ranges(module_format, held)
    for local, tensor in packed.tensors.items():
        part = tensor[tuple(slice(*one) for one in ranges[local])]
        tensors[local] = rebase(local, part, module_format, held)[None].contiguous().to(DEVICE)
    own = cut(module_format, held)
    codec, found = arrange(tensors, own, codec_of(own, held, region))
    rows, columns = region
    held_weight = Weight(codec, {local: one[0] for local, one in found.items()})
    return held_weight, packed.reference[slice(*rows), slice(*columns)]
