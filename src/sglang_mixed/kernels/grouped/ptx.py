"""PTX of the Triton kernels: codes of 4 bits and of e4m3 become BF16 or FP16 by few instructions for two at once."""

from __future__ import annotations

import triton.language as tl


def _fields_asm(kind: str, magic: int, one: int, middle: int) -> tl.constexpr:
    """PTX for two words' 8 fields of 4 bits: each becomes `magic` + code in 16 bits, and `middle` is added."""
    lines = [
        "{",
        ".reg .b32 half, other, pair, one, middle;",
        f"mov.b32 one, {one * 0x10001:#x};",
        f"mov.b32 middle, {middle * 0x10001:#x};",
        "prmt.b32 half, $8, $9, 0x5410;",
        "prmt.b32 other, $8, $9, 0x7632;",
    ]
    for number in range(8):  # a register of the words may become one of the fields: they are read first
        if number == 4:
            lines.append("mov.b32 half, other;")
        elif number:
            lines.append("shr.u32 half, half, 4;")
        lines.append(f"lop3.b32 pair, half, 0x000F000F, {magic * 0x10001:#x}, 0xEA;")
        lines.append(f"fma.rn.{kind}x2 ${number}, pair, one, middle;")
    return tl.constexpr("\n".join([*lines, "}"]))


#: 128 and -136 in BF16, 1024 and -1032 in FP16.
FIELDS_BF16 = _fields_asm("bf16", 0x4300, 0x3F80, 0xC308)
FIELDS_FP16 = _fields_asm("f16", 0x6400, 0x3C00, 0xE408)
FIELDS_CONSTRAINTS = tl.constexpr("=r,=r,=r,=r,=r,=r,=r,=r,r,r")


def _to_16_bits(kind: str, shift: int, factor: int, pairs: list[str]) -> list[str]:
    """PTX for pairs of e4m3 codes, each in the upper byte of its half: pair number n becomes $n.

    Exponent and fraction are those of 16 bits once they are in their places; what the exponent lacks then one product
    adds to all, subnormal numbers too. (GPUs since Ada have an instruction for FP16, from which others have to make
    BF16 value by value, slower than memory.)
    """
    lines = [
        ".reg .b32 sign, factor, zero;",
        f"mov.b32 factor, {factor * 0x10001:#x};",
        "mov.b32 zero, 0x80008000;",
    ]
    for number, pair in enumerate(pairs):
        lines += [
            f"and.b32 sign, {pair}, 0x80008000;",
            f"shr.u32 {pair}, {pair}, {shift};",
            f"lop3.b32 {pair}, {pair}, {(0x7F00 >> shift) * 0x10001:#x}, sign, 0xEA;",
            f"fma.rn.{kind}x2 ${number}, {pair}, factor, zero;",
        ]
    return lines


def _e4m3_asm(kind: str, shift: int, factor: int) -> tl.constexpr:
    """PTX for the four e4m3 codes of a word."""
    lines = ["{", ".reg .b32 low, high;", "prmt.b32 low, $2, 0, 0x1404;", "prmt.b32 high, $2, 0, 0x3424;"]
    return tl.constexpr("\n".join([*lines, *_to_16_bits(kind, shift, factor, ["low", "high"]), "}"]))


def _octets_asm(kind: str, shift: int, factor: int) -> tl.constexpr:
    """PTX for two words' 4 fields of an e4m3 code."""
    pairs = ["first", "second", "third", "fourth"]
    lines = ["{", f".reg .b32 {', '.join(pairs)};"]  # a register of the words may become one of the fields
    lines += [f"prmt.b32 {pair}, $4, $5, {0x4400 + 0x1111 * field:#x};" for field, pair in enumerate(pairs)]
    return tl.constexpr("\n".join([*lines, *_to_16_bits(kind, shift, factor, pairs), "}"]))


#: 2**120 and 2**8.
E4M3_BF16 = _e4m3_asm("bf16", 4, 0x7B80)
E4M3_FP16 = _e4m3_asm("f16", 1, 0x5C00)
E4M3_CONSTRAINTS = tl.constexpr("=r,=r,r")
OCTETS_BF16 = _octets_asm("bf16", 4, 0x7B80)
OCTETS_FP16 = _octets_asm("f16", 1, 0x5C00)
OCTETS_CONSTRAINTS = tl.constexpr("=r,=r,=r,=r,r,r")
