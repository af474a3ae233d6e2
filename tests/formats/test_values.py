"""Values that no weight may have are found."""

from __future__ import annotations

import numpy as np
import packers
import pytest

from sglang_mixed.errors import InvalidValueError
from sglang_mixed.formats import detect
from sglang_mixed.formats.values import check_values


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("out", [64, 832, 830])
def test_symmetric_zero_points_are_the_middle_everywhere(bits: int, version: int, out: int) -> None:
    module = packers.gptq(np.random.default_rng(bits), out, 256, bits=bits, version=version)
    found, zeros = detect("m", module.infos, module.config), module.tensors["qzeros"]
    check_values("qzeros", zeros, found)
    for row, word in ((0, 0), (3, 1), (len(zeros) - 1, zeros.shape[1] - 1)):
        broken = zeros.clone()
        broken[row, word] ^= 1
        with pytest.raises(InvalidValueError, match="zero points from"):
            check_values("qzeros", broken, found)
