"""Integers of any width as a little-endian bit stream in int32 words, lowest bits first."""

from __future__ import annotations

import math

import torch


def packing(bits: int) -> tuple[int, int]:
    """(values, int32 words) of the smallest unit of a bit stream in which no value straddles the end."""
    values = 32 // math.gcd(32, bits)
    return values, values * bits // 32


def unpack(words: torch.Tensor, bits: int, dim: int = 0) -> torch.Tensor:
    """int32 [..., n, ...] -> uint8 [..., n*32/bits, ...]: the bit stream along dimension `dim`, lowest bits first."""
    num_values, num_words = packing(bits)
    units = words.reshape(*words.shape[:dim], -1, num_words, *words.shape[dim + 1 :])
    shape = (*units.shape[: dim + 1], num_values, *units.shape[dim + 2 :])
    codes = torch.empty(shape, dtype=torch.uint8, device=words.device)
    for value in range(num_values):
        word, shift = divmod(value * bits, 32)
        code = units.select(dim + 1, word) >> shift
        if (low := 32 - shift) < bits:  # straddles: `>>` filled the upper bits with the sign, which must go first
            code = (code & ((1 << low) - 1)) | (units.select(dim + 1, word + 1) << low)
        codes.select(dim + 1, value).copy_(code & ((1 << bits) - 1))
    return codes.flatten(dim, dim + 1)
