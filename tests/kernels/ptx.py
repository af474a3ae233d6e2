"""A small interpreter of PTX: Triton's own, which other tests use, cannot run what kernels say in it."""

from __future__ import annotations

import re

import numpy as np
import torch

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


def run(text: str, inputs: dict[str, int], outputs: int) -> list[int]:
    """Registers $0, $1, ... after these lines. Knows only the instructions that the kernels use."""
    registers = dict(inputs)

    def value(operand: str) -> int:
        return registers[operand] if operand in registers else int(operand, 0)

    for line in text.strip("{}\n ").splitlines():
        if line.startswith(".reg"):
            continue
        name, rest = line.rstrip(";").split(" ", 1)
        target, *operands = (operand.strip() for operand in rest.split(","))
        values = [value(operand) for operand in operands]
        registers[target] = execute(name, values)
    return [registers[f"${number}"] for number in range(outputs)]


def execute(name: str, values: list[int]) -> int:
    if name == "mov.b32":
        return values[0]
    if name == "add.u32":
        return (values[0] + values[1]) & 0xFFFFFFFF
    if name == "shr.u32":
        return values[0] >> values[1]
    if name == "shf.r.wrap.b32":
        return (values[0] | values[1] << 32) >> values[2] & 0xFFFFFFFF
    if name == "and.b32":
        return values[0] & values[1]
    if name == "prmt.b32":
        octets = (values[0] | values[1] << 32).to_bytes(8, "little")
        return int.from_bytes(bytes(octets[values[2] >> 4 * place & 7] for place in range(4)), "little")
    if name == "lop3.b32":
        a, b, c, table = values
        terms = (
            (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
            for index in range(8)
            if table >> index & 1
        )
        found = 0
        for term in terms:
            found |= term
        return found & 0xFFFFFFFF
    kind = re.fullmatch(r"fma\.rn\.(bf16|f16)x2", name)
    assert kind, name
    pairs = (np.array([one], np.uint32).view(np.int16) for one in values)
    x, y, z = (torch.from_numpy(pair.copy()).view(DTYPES[kind[1]]).double() for pair in pairs)
    return int((x * y + z).to(DTYPES[kind[1]]).view(torch.int16).numpy().view(np.uint32)[0])
