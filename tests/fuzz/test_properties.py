"""What holds for every name, header, pattern and format, tried on drawn ones."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from sglang_mixed.checkpoint import Read, open_checkpoint, opened, read_entry
from sglang_mixed.checkpoint.header import read_header
from sglang_mixed.digests import sha256
from sglang_mixed.errors import CheckpointError, InvalidValueError, PatternError
from sglang_mixed.formats import detect, from_json, get_format, nbytes, tensor_specs, to_json
from sglang_mixed.formats.base import TORCH_DTYPES, ModuleFormat
from sglang_mixed.formats.bit_stream import packing, unpack
from sglang_mixed.formats.regular import compile_regex
from sglang_mixed.formats.slicing import Region, cut, rebase, tensor_ranges, whole, widen
from sglang_mixed.formats.values import check_values
from sglang_mixed.patterns import parse_pattern
from sglang_mixed.plan.fold import fold

from ..formats import packers
from ..models import write
from .drawn import NAME, PROPERTY, WORD, matched

SIZES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
DTYPES = st.sampled_from([code for code in TORCH_DTYPES if code not in ("BOOL", "F64")])


def tensor_of(code: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    size = math.prod(shape) * TORCH_DTYPES[code].itemsize
    if not size:
        return torch.empty(shape, dtype=TORCH_DTYPES[code])
    octets = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
    return torch.from_numpy(octets).view(TORCH_DTYPES[code]).reshape(shape)


TENSORS = st.dictionaries(NAME, st.tuples(DTYPES, SIZES, st.integers(0, 99)), min_size=1, max_size=6).map(
    lambda drawn: {name: tensor_of(*one) for name, one in drawn.items()}
)


# Files


@PROPERTY
@given(TENSORS)
def test_what_the_library_writes_is_read_bit_for_bit(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    checkpoint = open_checkpoint(folder)
    assert set(checkpoint.entries) == set(tensors)
    for name, tensor in tensors.items():
        found = checkpoint.read_tensor(name)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape) and sha256(found) == sha256(tensor)


@PROPERTY
@given(TENSORS, st.booleans())
def test_spaces_and_order_of_a_header_change_nothing(
    folder: Path, tensors: dict[str, torch.Tensor], backwards: bool
) -> None:
    save_file(tensors, folder / "a.safetensors")
    raw = (folder / "a.safetensors").read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    spaced = json.dumps(dict(reversed(header.items())) if backwards else header, indent=1).encode()
    (folder / "b.safetensors").write_bytes(len(spaced).to_bytes(8, "little") + spaced + raw[end:])
    one, other = (read_header(folder / f"{name}.safetensors") for name in "ab")
    begins = [
        {
            name: shard.entry(0, place).begin - shard.data_begin
            for name, place in zip(shard.names, shard.places, strict=True)
        }
        for shard in (one, other)
    ]
    assert begins[0] == begins[1]


@PROPERTY
@given(TENSORS, st.data())
def test_a_file_cut_anywhere_is_refused(folder: Path, tensors: dict[str, torch.Tensor], data: st.DataObject) -> None:
    file = folder / "a.safetensors"
    save_file(tensors, file)
    raw = file.read_bytes()
    file.write_bytes(raw[: data.draw(st.integers(0, len(raw) - 1))])
    with pytest.raises(CheckpointError):
        read_header(file)


@PROPERTY
@given(st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4)), DTYPES, st.data())
def test_a_part_of_a_tensor_is_the_slice_of_the_whole(
    folder: Path, shape: tuple[int, ...], code: str, data: st.DataObject
) -> None:
    tensor = tensor_of(code, shape, 1)
    save_file({"a": tensor_of("U8", (3,), 0), "b": tensor}, folder / "a.safetensors")
    shard = read_header(folder / "a.safetensors")
    ends = [sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size)))) for size in shape]
    ranges = tuple((begin, end) for begin, end in ends)
    place = shard.find("", "b")
    assert place is not None
    with opened(shard.path) as descriptor:
        found = read_entry(descriptor, shard.path, Read("b", shard.entry(0, place), ranges))
    assert sha256(found) == sha256(tensor[tuple(slice(*one) for one in ranges)])


@PROPERTY
@given(st.integers(1, 5))
def test_any_number_of_shards_is_one_checkpoint(folder: Path, shards: int) -> None:
    one, many = write(folder / "one"), write(folder / f"{shards}", shards=shards)
    first, second = open_checkpoint(one), open_checkpoint(many)
    assert first.modules.keys() == second.modules.keys()
    for module in ("lm_head", "model.layers.1.mlp.experts.3.up_proj"):
        assert sha256(first.read(module)["weight"]) == sha256(second.read(module)["weight"])


@PROPERTY
@given(st.dictionaries(WORD, st.integers() | st.text(max_size=3), min_size=1, max_size=5), st.data())
def test_a_key_that_stands_twice_is_refused(folder: Path, config: dict[str, Any], data: st.DataObject) -> None:
    folder = write(folder / "model")
    twice = data.draw(st.sampled_from(sorted(config)))
    text = json.dumps({"nested": config})[:-2] + f", {json.dumps(twice)}: 1}}}}"
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="stands twice"):
        open_checkpoint(folder)


# Patterns


@PROPERTY
@given(st.lists(NAME, min_size=1, max_size=12, unique=True), st.text("ab0*_", min_size=1, max_size=5))
def test_a_star_is_any_text_within_a_part(names: list[str], glob: str) -> None:
    if "**" in glob:
        return
    regex = re.compile(re.escape(glob).replace(r"\*", "[^.]*"))
    assert matched(glob, names) == {name for name in names if regex.fullmatch(name)}


@PROPERTY
@given(st.lists(NAME, min_size=1, max_size=12, unique=True), st.lists(WORD | st.just("**"), min_size=1, max_size=4))
def test_two_stars_are_any_number_of_parts(names: list[str], parts: list[str]) -> None:
    text = "".join(r"(?:[^.]+\.)*" if part == "**" else re.escape(part) + r"\." for part in parts)
    regex = re.compile(text)
    assert matched(".".join(parts), names) == {
        name for name in names if regex.fullmatch(f"{name}.") or regex.fullmatch(f"{name}.weight.")
    }


@PROPERTY
@given(st.integers(0, 30), st.integers(0, 30))
def test_a_range_is_the_numbers_it_counts(first: int, last: int) -> None:
    names = [f"layers.{number}" for number in range(40)]
    if first > last:
        with pytest.raises(PatternError):
            parse_pattern(f"layers.{{{first}..{last}}}")
    else:
        expected = {f"layers.{number}" for number in range(first, last + 1)}
        assert matched(f"layers.{{{first}..{last}}}", names) == expected


@PROPERTY
@given(st.lists(NAME, min_size=1, max_size=12, unique=True), st.data())
def test_a_name_is_the_pattern_of_itself_alone(names: list[str], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(names))
    above = name.removesuffix(".weight")
    assert matched(name, names) == {one for one in names if one in (name, above)}


@PROPERTY
@given(st.sets(st.tuples(st.integers(0, 5), st.integers(0, 5), st.sampled_from(("up", "down"))), min_size=1))
def test_folded_names_unfold_to_the_same(drawn: set[tuple[int, int, str]]) -> None:
    every = [f"layers.{a}.experts.{b}.{c}" for a, b, c in itertools.product(range(6), range(6), ("up", "down"))]
    wanted = {f"layers.{a}.experts.{b}.{c}" for a, b, c in drawn}
    assert set().union(*(matched(pattern, every) for pattern in fold(sorted(wanted)))) == wanted


@PROPERTY
@given(NAME)
def test_every_plain_name_is_a_regular_expression_that_is_let_through(name: str) -> None:
    assert compile_regex(re.escape(name)).fullmatch(name)
    assert compile_regex(f".*{re.escape(name)}.*").match(f"x.{name}.y")


# Formats


@PROPERTY
@given(st.sampled_from((2, 3, 4, 5, 6, 7, 8)), st.integers(1, 3), st.integers(1, 4), st.integers(0, 9))
def test_packed_integers_unpack_exactly(bits: int, units: int, rows: int, seed: int) -> None:
    values, _ = packing(bits)
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (units * values, rows), np.uint8)
    words = torch.from_numpy(packers.bit_stream(codes, bits, values).copy())
    assert torch.equal(unpack(words, bits), torch.from_numpy(codes))
    assert torch.equal(unpack(words.T.contiguous(), bits, 1), torch.from_numpy(codes.T.copy()))


def packed(kind: str, rows: int, columns: int, seed: int) -> packers.Packed:
    rng = np.random.default_rng(seed)
    build: Callable[..., packers.Packed] = {"gptq": packers.gptq, "awq": packers.awq}[kind]
    return build(rng, rows, columns)


MODULES = st.tuples(
    st.sampled_from(("gptq", "awq")), st.sampled_from((64, 128)), st.sampled_from((64, 128)), st.integers(0, 9)
)


def found_in(module: packers.Packed) -> ModuleFormat:
    return detect("m", module.infos, module.config)


@PROPERTY
@given(MODULES)
def test_decoded_weights_are_the_packers_own(drawn: tuple[str, int, int, int]) -> None:
    module = packed(*drawn)
    found = found_in(module)
    weight = get_format(found.name).dequantize(module.tensors, found.parameters, torch.float32)
    assert torch.equal(weight.double(), torch.from_numpy(module.reference).float().double())


@PROPERTY
@given(MODULES)
def test_a_format_is_its_json(drawn: tuple[str, int, int, int]) -> None:
    found = found_in(packed(*drawn))
    assert from_json(json.loads(json.dumps(to_json(found)))) == found


@PROPERTY
@given(MODULES)
def test_bytes_of_a_format_are_those_of_its_tensors(drawn: tuple[str, int, int, int]) -> None:
    module = packed(*drawn)
    found = found_in(module)
    assert nbytes(found) == sum(tensor.nbytes for name, tensor in module.tensors.items() if name != "bias")
    assert {name: spec.shape for name, spec in tensor_specs(found).items() if name in module.tensors} == {
        name: tuple(tensor.shape) for name, tensor in module.tensors.items()
    }


@PROPERTY
@given(MODULES, st.data())
def test_what_is_cut_and_put_together_again_is_the_whole(drawn: tuple[str, int, int, int], data: st.DataObject) -> None:
    module = packed(*drawn)
    found = found_in(module)
    side = data.draw(st.sampled_from(("rows", "columns")))
    size = found.shape[0 if side == "rows" else 1]
    places = sorted({0, size, *data.draw(st.lists(st.integers(0, size // 32).map(lambda unit: unit * 32), max_size=2))})
    weights = []
    for begin, end in itertools.pairwise(places):
        region = whole(found.shape)._replace(**{side: (begin, end)})
        held = widen(found, region)
        assert held == region
        part, ranges = cut(found, held), tensor_ranges(found, held)
        tensors = {
            name: rebase(name, tensor[tuple(slice(*one) for one in ranges[name])], found, held)
            for name, tensor in module.tensors.items()
        }
        weights.append(get_format(part.name).dequantize(tensors, part.parameters, torch.float32))
    joined = torch.cat(weights, 0 if side == "rows" else 1)
    assert torch.equal(joined, get_format(found.name).dequantize(module.tensors, found.parameters, torch.float32))


@PROPERTY
@given(MODULES, st.data())
def test_a_widened_region_holds_the_region_and_is_not_widened_again(
    drawn: tuple[str, int, int, int], data: st.DataObject
) -> None:
    found = found_in(packed(*drawn))
    ends = [sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size)))) for size in found.shape]
    region = Region((ends[0][0], ends[0][1]), (ends[1][0], ends[1][1]))
    held = widen(found, region)
    assert widen(found, held) == held
    for (begin, end), (first, last) in zip(region, held, strict=True):
        assert first <= begin and (end <= last or begin == end)


@PROPERTY
@given(MODULES, st.integers(0, 10**6), st.sampled_from((float("nan"), float("inf"), -float("inf"))))
def test_one_scale_that_is_no_number_is_found_wherever_it_is(
    drawn: tuple[str, int, int, int], place: int, value: float
) -> None:
    module = packed(*drawn)
    found, scales = found_in(module), module.tensors["scales"]
    check_values("scales", scales, found)
    place %= scales.numel()
    scales.view(-1)[place] = value
    with pytest.raises(
        InvalidValueError, match=re.escape(str(list(np.unravel_index(place, scales.shape)))[1:-1]) + "|at"
    ):
        check_values("scales", scales, found)
