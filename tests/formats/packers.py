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
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64",
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


def awq(
    rng: np.random.Generator, out: int, columns: int, *, group: int = 32, scale_dtype: torch.dtype = torch.float16
) -> Packed:
    size = columns if group == -1 else group
    codes = rng.integers(0, 16, (columns, out))
    zeros = rng.integers(0, 16, (-(-columns // size), out))
    scales = torch.from_numpy(rng.uniform(0.001, 0.1, zeros.shape)).to(scale_dtype)
    groups = np.arange(columns) // size
    reference = (codes - zeros[groups]) * scales.double().numpy()[groups]
    tensors = {"qweight": awq_words(codes), "qzeros": awq_words(zeros), "scales": scales}
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return Packed(tensors, reference.T, config)


def awq_words(codes: np.ndarray) -> torch.Tensor:
    """[n, m] -> int32 [n, m/8]: in hexadecimal, highest nibble first, a word reads columns 7 5 3 1 6 4 2 0."""
    rows = [
        ["".join(f"{row[i + k]:x}" for k in (7, 5, 3, 1, 6, 4, 2, 0)) for i in range(0, len(row), 8)] for row in codes
    ]
    words = np.array([[int(word, 16) for word in row] for row in rows], dtype=np.uint32)
    return torch.from_numpy(words.view(np.int32))


def packed(
    rng: np.random.Generator,
    out: int,
    columns: int,
    *,
    bits: int = 4,
    group: int | None = 32,
    strategy: str = "group",
    sym: bool = True,
    act_order: bool = False,
    scale_dtype: torch.dtype = torch.bfloat16,
    shape_dtype: torch.dtype = torch.int64,
) -> Packed:
    """compressed-tensors' pack-quantized."""
    half = 2 ** (bits - 1)
    size = min(group, columns) if strategy == "group" and group else columns
    grid = (1, 1) if strategy == "tensor" else (out, -(-columns // size))
    values = rng.integers(-half, half, (out, columns))
    zeros = np.zeros(grid, int) if sym else rng.integers(-half, half, grid)
    scales = torch.from_numpy(rng.uniform(0.001, 0.1, grid)).to(scale_dtype)
    g_idx = np.arange(columns) // size
    if act_order:
        rng.shuffle(g_idx)
    rows = np.zeros((out, 1), int) if strategy == "tensor" else np.arange(out)[:, None]
    groups = np.zeros(columns, int) if strategy == "tensor" else g_idx
    reference = (values - zeros[rows, groups]) * scales.double().numpy()[rows, groups]
    tensors = {
        "weight_packed": torch.from_numpy(dense(values + half, bits)),
        "weight_scale": scales.reshape(1) if strategy == "tensor" else scales,
        "weight_shape": torch.tensor([out, columns], dtype=shape_dtype),
    }
    if not sym:
        stored = zeros.reshape(1).astype(np.int8) if strategy == "tensor" else dense((zeros + half).T, bits).T.copy()
        tensors["weight_zero_point"] = torch.from_numpy(stored)
    if act_order:
        tensors["weight_g_idx"] = torch.from_numpy(g_idx.astype(np.int32))
    weights = {
        "num_bits": bits,
        "type": "int",
        "strategy": strategy,
        "group_size": group if strategy == "group" else None,
        "symmetric": sym,
        "actorder": "group" if act_order else None,
    }
    group_0 = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group_0}}
    return Packed(tensors, reference, config)


def dense(codes: np.ndarray, bits: int) -> np.ndarray:
    """[n, m] -> int32 [n, ceil(m*bits/32)]: each row as one long number, the first value lowest."""
    length = -(-codes.shape[1] * bits // 32) * 4
    numbers = [sum(int(code) << (bits * place) for place, code in enumerate(row)) for row in codes]
    return np.array([np.frombuffer(number.to_bytes(length, "little"), "<i4") for number in numbers])


#: The positive values of e2m1: exponent 0 is subnormal, in steps of a half.
E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)


def fp4(rng: np.random.Generator, out: int, columns: int) -> tuple[torch.Tensor, np.ndarray]:
    """uint8 [out, in/2] and the values [out, in]."""
    codes = rng.integers(0, 16, (out, columns))
    values = np.array([-E2M1[code - 8] if code > 7 else E2M1[code] for code in codes.ravel()]).reshape(codes.shape)
    return torch.from_numpy((codes[:, 0::2] + 16 * codes[:, 1::2]).astype(np.uint8)), values


def nvfp4(rng: np.random.Generator, out: int, columns: int, *, modelopt: bool = False, static: bool = False) -> Packed:
    weight, values = fp4(rng, out, columns)
    octets = rng.integers(0, 0x7F, (out, -(-columns // 16))).astype(np.uint8)
    scale = torch.from_numpy(octets.copy()).view(torch.float8_e4m3fn)
    whole = torch.tensor(rng.uniform(1e-4, 1e-3) if modelopt else rng.uniform(1e3, 1e4), dtype=torch.float32)
    factor = spread(e4m3(octets), (1, 16), (out, columns))
    if modelopt:
        tensors = {"weight": weight, "weight_scale": scale, "weight_scale_2": whole}
        config: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}
        reference = values * factor * float(whole)
    else:
        tensors = {"weight_packed": weight, "weight_scale": scale, "weight_global_scale": whole.reshape(1)}
        weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
        group_0 = {"targets": ["Linear"], "weights": weights}
        config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group_0}}
        reference = values * factor / float(whole)
    if static:
        tensors |= {"input_scale": torch.tensor(0.5)} if modelopt else {"input_global_scale": torch.ones(1)}
    return Packed(tensors, reference, config)


def mxfp4(rng: np.random.Generator, out: int, columns: int, *, writer: str = "compressed-tensors") -> Packed:
    """`writer`: "compressed-tensors", "quark" or "deepseek"."""
    weight, values = fp4(rng, out, columns)
    exponents = rng.integers(0, 250, (out, -(-columns // 32))).astype(np.uint8)
    scale = torch.from_numpy(exponents.copy())
    reference = values * spread(2.0 ** (exponents.astype(float) - 127), (1, 32), (out, columns))
    if writer == "deepseek":
        tensors = {"weight": weight.view(torch.int8), "scale": scale.view(torch.float8_e8m0fnu)}
        return Packed(
            tensors, reference, {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}
        )
    if writer == "quark":
        return Packed({"weight": weight, "weight_scale": scale}, reference, {"quant_method": "quark"})
    weights = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True}
    group_0 = {"targets": ["Linear"], "weights": weights}
    config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group_0}}
    return Packed({"weight_packed": weight, "weight_scale": scale}, reference, config)


def mxfp8(
    rng: np.random.Generator,
    shape: tuple[int, int],
    config: dict[str, Any],
    scale_dtype: torch.dtype,
    block: tuple[int, int] = (1, 32),
) -> Packed:
    """e4m3 values with exponents per 32 columns (or larger blocks)."""
    octets = rng.integers(0, 256, shape).astype(np.uint8)
    octets[octets & 127 == 127] = 0x7E
    grid = tuple(-(-size // unit) for size, unit in zip(shape, block, strict=True))
    exponents = rng.integers(100, 150, grid).astype(np.uint8)
    tensors = {
        "weight": torch.from_numpy(octets.copy()).view(torch.float8_e4m3fn),
        "weight_scale": torch.from_numpy(exponents.copy()).view(scale_dtype),
    }
    reference = e4m3(octets) * spread(2.0 ** (exponents.astype(float) - 127), block, shape)
    return Packed(tensors, reference, config)


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
