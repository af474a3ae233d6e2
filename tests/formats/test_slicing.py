"""Any region of any format: widened, cut tensor by tensor, it decodes to exactly that part of the weight."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch
from test_formats import CASES

from sglang_mixed.formats import ModuleFormat, detect, get_format
from sglang_mixed.formats.slicing import Region, cut, rebase, tensor_ranges, whole, widen

MATRICES = [name for name, (build, _) in CASES.items() if build(np.random.default_rng(0)).reference.ndim == 2]


def regions(rng: np.random.Generator, shape: tuple[int, ...]) -> list[Region]:
    """Halves, quarters, and two random parts."""
    rows, columns = shape
    found = [Region((rows // 2, rows), (0, columns)), Region((0, rows), (columns // 4, columns // 2))]
    for _ in range(2):
        found.append(Region(*(tuple(sorted(rng.choice(size + 1, 2, replace=False).tolist())) for size in shape)))
    return found


@pytest.mark.parametrize("name", MATRICES)
def test_a_cut_weight_decodes_to_that_part_of_the_whole(name: str) -> None:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    module = CASES[name][0](rng)
    found = detect("model.layers.0.mlp", module.infos, module.config)
    for region in regions(rng, found.shape):
        held = widen(found, region)
        assert all(a <= b <= c <= d for (b, c), (a, d) in zip(region, held, strict=True))
        part = cut(found, held)
        decoded = get_format(part.name).dequantize(
            cut_tensors(module.tensors, found, held), part.parameters, torch.float32
        )
        expected = module.reference[slice(*held.rows), slice(*held.columns)].astype(np.float32)
        np.testing.assert_array_equal(decoded.numpy(), expected)


def cut_tensors(tensors: dict[str, torch.Tensor], found: ModuleFormat, held: Region) -> dict[str, torch.Tensor]:
    part = cut(found, held)
    specs = get_format(part.name).tensors(part.parameters, part.shape)
    made = {}
    for local, ranges in tensor_ranges(found, held).items():
        if local in tensors:
            made[local] = rebase(local, tensors[local][tuple(slice(*one) for one in ranges)], found, held)
            assert tuple(made[local].shape) == specs[local].shape
    return made


def test_a_region_that_is_everything_changes_nothing() -> None:
    module = CASES[MATRICES[0]][0](np.random.default_rng(0))
    found = detect("m", module.infos, module.config)
    assert widen(found, whole(found.shape)) == whole(found.shape)
    assert cut(found, whole(found.shape)) is found
