"""Independent packers: numpy only, one value at a time where it matters, with the reference weight in float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from sglang_mixed.formats import TensorInfo

CODES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
}


@dataclass
class Packed:
    """A module as a quantizer would write it, with what it must decode to (float64 [out, in])."""

    tensors: dict[str, torch.Tensor]
    reference: np.ndarray
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def infos(self) -> dict[str, TensorInfo]:
        return {name: TensorInfo(CODES[one.dtype], tuple(one.shape)) for name, one in self.tensors.items()}


def bit_stream(codes: np.ndarray, bits: int, unit: int) -> np.ndarray:
    """[n, m] -> int32 words along dimension 0, lowest bits first; n is filled up to whole units of `unit` values."""
    short = -len(codes) % unit
    codes = np.concatenate([codes, np.zeros((short, codes.shape[1]), codes.dtype)]).astype(np.uint8)
    stream = np.unpackbits(codes[:, None, :], axis=1, bitorder="little", count=bits)
    octets = np.packbits(stream.reshape(-1, codes.shape[1]), axis=0, bitorder="little")
    return np.ascontiguousarray(octets.T).view("<i4").T


def gptq(
    rng: np.random.Generator,
    out: int,
    columns: int,
    *,
    bits: int = 4,
    group: int = 32,
    sym: bool = True,
    version: int = 1,
    order: str = "g_idx",
    scale_dtype: torch.dtype = torch.float16,
) -> Packed:
    """`order`: "act" (a shuffled g_idx), "g_idx" (a consecutive one) or "none"."""
    size = columns if group == -1 else group
    groups = -(-columns // size)
    codes = rng.integers(0, 2**bits, (columns, out))
    stored = rng.integers(0, 2**bits, (groups, out))
    if sym:
        stored[:] = 2 ** (bits - 1) - (version == 1)
    scales = torch.from_numpy(rng.uniform(0.001, 0.1, (groups, out))).to(scale_dtype)
    g_idx = np.arange(columns) // size
    if order == "act":
        rng.shuffle(g_idx)
    zeros = stored + (version == 1)
    reference = (codes - zeros[g_idx]) * scales.double().numpy()[g_idx]
    unit = 32 if bits == 3 else 32 // bits
    tensors = {
        "qweight": torch.from_numpy(bit_stream(codes, bits, unit).copy()),
        "qzeros": torch.from_numpy(bit_stream(stored.T, bits, unit).T.copy()),
        "scales": scales,
    }
    if order != "none":
        tensors["g_idx"] = torch.from_numpy(g_idx.astype(np.int32))
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": sym, "desc_act": order == "act"}
    if version == 2:
        config["checkpoint_format"] = "gptq_v2"
    return Packed(tensors, reference.T, config)


def e4m3(octets: np.ndarray) -> np.ndarray:
    """OCP FP8 E4M3: no infinities, 0x7F and 0xFF are NaN, subnormals in steps of 2**-9."""
    exponent, mantissa = (octets >> 3) & 15, octets & 7
    value = np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent.astype(int) - 7))
    value = np.where((exponent == 15) & (mantissa == 7), np.nan, value)
    return np.where(octets & 128, -value, value)


def spread(scale: np.ndarray, block: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    rows, columns = (np.arange(size) // unit for size, unit in zip(shape, block, strict=True))
    return scale[rows][:, columns]


def eight_bit(
    rng: np.random.Generator,
    shape: tuple[int, int],
    block: tuple[int, int],
    scale_shape: tuple[int, ...],
    config: dict[str, Any],
    *,
    name: str = "weight_scale",
    scale_dtype: torch.dtype = torch.float32,
    inverse: bool = False,
    static: bool = False,
    integer: bool = False,
) -> Packed:
    """`block` is how many rows and columns share a scale; `scale_shape` is how the file stores the scales."""
    octets = rng.integers(0, 256, shape).astype(np.uint8)
    if integer:
        values, weight = octets.view(np.int8).astype(float), torch.from_numpy(octets.view(np.int8).copy())
    else:
        octets[octets & 127 == 127] = 0x7E
        values, weight = e4m3(octets), torch.from_numpy(octets.copy()).view(torch.float8_e4m3fn)
    grid = tuple(-(-size // unit) for size, unit in zip(shape, block, strict=True))
    scale = torch.from_numpy(rng.uniform(0.001, 2, grid)).to(scale_dtype)
    factor = spread(scale.double().numpy(), block, shape)
    tensors = {"weight": weight, name: scale.reshape(scale_shape)}
    if static:
        tensors["input_scale"] = torch.tensor(0.5)
    return Packed(tensors, values / factor if inverse else values * factor, config)


def plain(rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Packed:
    weight = torch.from_numpy(rng.normal(size=shape)).to(dtype)
    return Packed({"weight": weight}, weight.double().numpy())
