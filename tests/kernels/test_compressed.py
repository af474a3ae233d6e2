"""A stacked weight: parts read into place or handed over, and every part restored byte for byte."""

from __future__ import annotations

import pytest
import torch

from sglang_mixed.formats import ModuleFormat, detect
from sglang_mixed.formats.base import TensorInfo
from sglang_mixed.kernels.compressed import CompressedWeight, NamedPart


def plain(rows: int, seed: int) -> tuple[torch.Tensor, ModuleFormat]:
    weight = torch.randn(rows, 24, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return weight, detect("m", {"weight": TensorInfo("BF16", (rows, 24))}, {})


@pytest.mark.parametrize("in_place", [(True, True), (True, False), (False, False)])
def test_parts_are_restored_whether_read_in_place_or_handed_over(in_place: tuple[bool, bool]) -> None:
    parts = [plain(16, 1), plain(8, 2)]
    stacked = CompressedWeight([NamedPart(name, one) for name, (_, one) in zip("qk", parts, strict=True)])
    for index in range(2):
        stacked.expect(index, "weight")
    for index, (weight, _) in enumerate(parts):
        tensor = weight
        if in_place[index]:
            place = stacked.destination(index, "weight")
            assert place is not None
            tensor = place.copy_(weight)
        stacked.receive(index, "weight", tensor)
    restored = stacked.restore()
    for name, (weight, _) in zip("qk", parts, strict=True):
        assert torch.equal(restored[f"{name}.weight"], weight)
    x = torch.randn(3, 24).bfloat16()
    assert torch.equal(stacked.linear(x), torch.nn.functional.linear(x, torch.cat([weight for weight, _ in parts])))
