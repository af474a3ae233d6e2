"""The grouped kernels' own PTX on every code there is: Triton's interpreter, which other tests use, cannot run it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ptx import run

from sglang_mixed.kernels.grouped import decode


def halves(register: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(np.array([register], np.uint32).view(np.int16).copy()).view(dtype)


@pytest.mark.parametrize(("text", "dtype"), [("E4M3_BF16", torch.bfloat16), ("E4M3_FP16", torch.float16)])
def test_every_e4m3_code_that_is_a_number_becomes_it(text: str, dtype: torch.dtype) -> None:
    numbers = [code for code in range(256) if code & 0x7F != 0x7F]
    for first in range(0, len(numbers), 4):
        codes = [*numbers[first : first + 4], 0, 0][:4]
        low, high = run(getattr(decode, text).value, {"$2": int.from_bytes(bytes(codes), "little")}, 2)
        found = torch.cat([halves(low, dtype), halves(high, dtype)]).double()
        expected = torch.tensor(codes, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
        assert torch.equal(found, expected)
        assert torch.equal(found.signbit(), expected.signbit())


@pytest.mark.parametrize(("text", "dtype"), [("FIELDS_BF16", torch.bfloat16), ("FIELDS_FP16", torch.float16)])
def test_every_field_of_two_words_becomes_its_code_less_the_middle(text: str, dtype: torch.dtype) -> None:
    for turn in range(16):
        codes = np.array([[(turn + 3 * field + 7 * word) % 16 for field in range(8)] for word in range(2)])
        words = [sum(int(code) << 4 * field for field, code in enumerate(row)) for row in codes]
        found = run(getattr(decode, text).value, {"$8": words[0], "$9": words[1]}, 8)
        values = torch.stack([halves(register, dtype) for register in found]).double()
        assert torch.equal(values, torch.from_numpy(codes.T - 8).double())


@pytest.mark.parametrize(("text", "dtype"), [("OCTETS_BF16", torch.bfloat16), ("OCTETS_FP16", torch.float16)])
def test_every_field_of_two_words_becomes_its_e4m3_number(text: str, dtype: torch.dtype) -> None:
    numbers = [code for code in range(256) if code & 0x7F != 0x7F]
    for turn in range(len(numbers)):
        codes = np.array([[numbers[(turn + 31 * (4 * word + field)) % 254] for field in range(4)] for word in range(2)])
        words = [int.from_bytes(bytes(row), "little") for row in codes.tolist()]
        found = torch.stack(
            [halves(one, dtype) for one in run(getattr(decode, text).value, {"$4": words[0], "$5": words[1]}, 4)]
        )
        expected = torch.from_numpy(codes.T.astype(np.uint8)).contiguous().view(torch.float8_e4m3fn).double()
        assert torch.equal(found.double(), expected)
        assert torch.equal(found.signbit(), expected.signbit())
