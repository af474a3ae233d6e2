"""Attacks on a safetensors header: one test per rule, each error naming file, tensor and rule."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sglang_mixed.checkpoint.header import MAX_HEADER_BYTES, read_header
from sglang_mixed.checkpoint.modules import Modules
from sglang_mixed.checkpoint.shard import Entry, Shard
from sglang_mixed.errors import CheckpointError, HeaderError, MissingFileError, TruncatedFileError


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write(path: Path, header: object, data: int = 24, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + bytes(data))
    return path


def compact(header: object) -> object:
    """The very text that the safetensors library would write; a header that is bytes already stays."""
    return (
        header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    )


def places(shard: Shard) -> dict[str, Entry]:
    """Every tensor's dtype, shape and place in the data, in the order of the file."""
    entries = (shard.entry(0, place) for place in shard.places)
    return {
        name: one._replace(begin=one.begin - shard.data_begin, end=one.end - shard.data_begin)
        for name, one in zip(shard.names, entries, strict=True)
    }


def as_json(shard: Shard) -> dict[str, Any]:
    """What the header says, but for metadata."""
    return {name: entry(one.begin, one.end, list(one.shape), one.dtype) for name, one in places(shard).items()}


GOOD = {"a": entry(0, 8, [2]), "b": entry(8, 24, [2, 2])}
#: What follows what in the first module is expected in the next ones, of which the last goes another way.
REPEATED = {
    **{f"m.{module}.a": entry(6 * module, 6 * module + 2, [2], "U8") for module in range(3)},
    **{f"m.{module}.b": entry(6 * module + 2, 6 * module + 6, [2, 2], "U8") for module in range(3)},
    "m.3.a": entry(18, 20, [2], "U8"),
    "m.3.c": entry(20, 24, [4], "U8"),
}
REPEATED = dict(sorted(REPEATED.items()))


@pytest.mark.parametrize(
    "header",
    [
        GOOD,
        {"__metadata__": {"format": "pt", "note": 'a "quoted" { brace'}, **GOOD},
        {"b": GOOD["b"], "a": GOOD["a"]},
        {"data_offsets": GOOD["a"], "b": GOOD["b"]},
        {'quo"ted': GOOD["a"], "b": GOOD["b"]},
        {"empty": entry(0, 0, [0, 4]), **GOOD, "also": entry(24, 24, [0])},
        {"scalar": entry(0, 4, []), "b": entry(4, 24, [5])},
        {"dotted.name.a": GOOD["a"], "dotted.name.b": GOOD["b"]},
        {"trailing.": GOOD["a"], "b": GOOD["b"]},
        REPEATED,
        {"größe": GOOD["a"], "b]": GOOD["b"]},
    ],
)
def test_what_the_format_allows_is_read(tmp_path: Path, header: dict[str, Any]) -> None:
    spaced = read_header(write(tmp_path / "x.safetensors", header))
    shard = read_header(write(tmp_path / "x.safetensors", compact(header)))
    assert list(places(spaced).items()) == list(places(shard).items())
    expected = {name: value for name, value in header.items() if name != "__metadata__"}
    assert as_json(shard) == expected


def test_padding_and_the_librarys_own_files(tmp_path: Path) -> None:
    write(tmp_path / "x.safetensors", json.dumps(GOOD).encode() + b"   ")
    assert read_header(tmp_path / "x.safetensors").names == ["a", "b"]
    tensors = {"w": torch.ones(3, 5), "n": torch.ones(7, dtype=torch.bfloat16), "e": torch.empty(0, 3)}
    save_file(tensors, tmp_path / "y.safetensors", metadata={"format": "pt"})
    shard = read_header(tmp_path / "y.safetensors")
    assert {name: one.shape for name, one in places(shard).items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }


HUGE = 1 << 70
ATTACKS: dict[str, tuple[object, str | None, str]] = {
    "not JSON": (b"{'a': 1}", None, "one JSON object"),
    "not UTF-8": (b'{"\xff": 1}  ', None, "one JSON object"),
    "not an object": (b"[1, 2, 3]", None, "begins with '{'"),
    "leading space": (b"  " + json.dumps(GOOD).encode(), None, "begins with '{'"),
    "deep nesting": (b'{"a":' + b"[" * 100_000, None, "one JSON object"),
    "duplicate name, compact": (
        b'{"m.a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"m.a":{"dtype":"F32","shape":[4],"data_offsets":[8,24]}}',
        "m.a", "stands once",
    ),
    "quotes within a name": (
        b'{"x":{"m.a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"m.b":{"dtype":"F32","shape":[4],"data_offsets":[8,24]}}',
        None, "one JSON object",
    ),
    "leading zero": (b'{"m.a":{"dtype":"F32","shape":[06],"data_offsets":[0,24]}}', None, "one JSON object"),
    "offsets cut elsewhere": (
        b'{"m.a":{"dtype":"F32","shape":[2],"data_offsets":[0]},"m.b":{"dtype":"F32","shape":[4],"data_offsets":[8,8,24]}}',
        "m.a", "begin not after end",
    ),
    "control character": (b'{"m.\na":{"dtype":"F32","shape":[6],"data_offsets":[0,24]}}', None, "one JSON object"),
    "tensor named as metadata": (
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"__metadata__":{"dtype":"F32","shape":[4],"data_offsets":[8,24]}}',
        "__metadata__", "text to text",
    ),
    "duplicate name": (
        json.dumps(GOOD)[:-1].encode() + b', "a": ' + json.dumps(GOOD["a"]).encode() + b"}", "a", "stands once",
    ),
    "duplicate name, escaped": (
        json.dumps(GOOD)[:-1].encode() + b', "\\u0061": ' + json.dumps(GOOD["a"]).encode() + b"}", "a", "stands once",
    ),
    "duplicate field": (
        b'{"a": {"dtype": "F32", "dtype": "F16", "shape": [6], "data_offsets": [0, 24]}}', "a", "once each",
    ),
    "duplicate metadata": (
        b'{"__metadata__": {}, "__metadata__": {}, "a": {"dtype":"F32","shape":[6],"data_offsets":[0,24]}}',
        "__metadata__", "stands once",
    ),
    "metadata that is no text": ({"__metadata__": {"a": 1}, **GOOD}, "__metadata__", "text to text"),
    "leading dot": ({".a": GOOD["a"], "b": GOOD["b"]}, ".a", "last dot"),
    "missing field": ({**GOOD, "a": {"dtype": "F32", "shape": [2]}}, "a", "an entry has"),
    "other field": ({**GOOD, "a": {**GOOD["a"], "more": 1}}, "a", "an entry has"),
    "entry that is no object": ({**GOOD, "a": 5}, "a", "an entry has"),
    "unknown dtype": ({**GOOD, "a": entry(0, 8, [2], "F128")}, "a", "dtypes that are read"),
    "dtype that is no text": ({**GOOD, "a": {**GOOD["a"], "dtype": 4}}, "a", "dtypes that are read"),
    "dtype that is a list": ({**GOOD, "a": {**GOOD["a"], "dtype": ["F32"]}}, "a", "dtypes that are read"),
    "negative size": ({**GOOD, "a": entry(0, 8, [-2])}, "a", "whole numbers"),
    "two negative sizes": ({**GOOD, "a": entry(0, 8, [-2, -1])}, "a", "whole numbers"),
    "fractional size": ({**GOOD, "a": entry(0, 8, [2.5])}, "a", "whole numbers"),  # type: ignore[list-item]
    "shape that is an object": ({**GOOD, "a": {**GOOD["a"], "shape": {}}}, "a", "whole numbers"),
    "shape that is text": ({**GOOD, "a": {**GOOD["a"], "shape": "2"}}, "a", "whole numbers"),
    "overflowing shape": ({**GOOD, "a": entry(0, 8, [HUGE, 2])}, "a", "whole numbers"),
    "shape larger than its bytes": ({**GOOD, "a": entry(0, 8, [3])}, "a", "equals the bytes"),
    "offsets reversed": ({**GOOD, "a": entry(8, 0, [2])}, "a", "begin not after end"),
    "negative offset": ({**GOOD, "a": entry(-8, 0, [2])}, "a", "begin not after end"),
    "three offsets": ({**GOOD, "a": {**GOOD["a"], "data_offsets": [0, 8, 8]}}, "a", "begin not after end"),
    "offsets that are no list": ({**GOOD, "a": {**GOOD["a"], "data_offsets": "08"}}, "a", "begin not after end"),
    "overlap": ({**GOOD, "b": entry(4, 20, [2, 2])}, "b", "without gap or overlap"),
    "gap": ({"a": GOOD["a"], "b": entry(12, 24, [3])}, "b", "without gap or overlap"),
    "gap at the start": ({"a": entry(8, 24, [4])}, "a", "without gap or overlap"),
    "bytes of no tensor": ({"a": entry(0, 16, [4])}, None, "to its end"),
    "no tensor but bytes": ({}, None, "to its end"),
}  # fmt: skip


@pytest.mark.parametrize("is_compact", [False, True])
@pytest.mark.parametrize("name", ATTACKS)
def test_a_broken_rule_is_named(tmp_path: Path, name: str, is_compact: bool) -> None:
    header, tensor, rule = ATTACKS[name]
    file = write(tmp_path / "x.safetensors", compact(header) if is_compact else header)
    with pytest.raises(HeaderError) as caught:
        Modules([read_header(file)])
    assert caught.value.file == str(file)
    assert caught.value.tensor == tensor
    assert rule in str(caught.value.rule)
    assert caught.value.remedy


def test_a_file_that_ends_early(tmp_path: Path) -> None:
    for data in (0, 7, 23):
        with pytest.raises(TruncatedFileError) as caught:
            read_header(write(tmp_path / "x.safetensors", compact(GOOD), data))
        assert caught.value.tensor == ("a" if data < 8 else "b")
    for size in (0, 5, 40):
        (tmp_path / "y.safetensors").write_bytes(struct.pack("<Q", 100) + bytes(40)[: max(0, size - 8)])
        if size < 8:
            (tmp_path / "y.safetensors").write_bytes(bytes(size))
        with pytest.raises(TruncatedFileError):
            read_header(tmp_path / "y.safetensors")


@pytest.mark.parametrize("length", [0, 1, MAX_HEADER_BYTES + 1, (1 << 64) - 1])
def test_a_header_length_out_of_bounds_takes_no_memory(tmp_path: Path, length: int) -> None:
    with pytest.raises(HeaderError, match="bytes long"):
        read_header(write(tmp_path / "x.safetensors", GOOD, length=length))


def test_a_git_lfs_pointer_and_a_missing_file(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    with pytest.raises(HeaderError) as caught:
        read_header(tmp_path / "x.safetensors")
    assert caught.value.remedy == "run: git lfs pull"
    with pytest.raises(MissingFileError):
        read_header(tmp_path / "gone.safetensors")


@settings(max_examples=1000, deadline=None)
@given(st.data())
def test_a_flipped_byte_is_an_error_of_ours_or_changes_nothing_that_matters(data: st.DataObject) -> None:
    import tempfile

    headers = [GOOD, {"__metadata__": {"format": "pt"}, "m.a": GOOD["a"], "m.b": GOOD["b"]}, REPEATED]
    header = data.draw(st.sampled_from(headers))
    raw = bytearray(json.dumps(header, separators=data.draw(st.sampled_from([(",", ":"), None]))).encode())
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        file = write(Path(folder) / "x.safetensors", bytes(raw))
        try:
            shard = read_header(file)
            Modules([shard])
        except CheckpointError:
            return
        # What we accept, a JSON parser reads alike.
        assert as_json(shard) == {name: value for name, value in json.loads(raw).items() if name != "__metadata__"}


@pytest.mark.parametrize("neighbours", [True, False])
def test_a_module_of_many_tensors_takes_memory_in_proportion(tmp_path: Path, neighbours: bool) -> None:
    def peak(count: int) -> int:
        names = [name for number in range(count) for name in (f"m.{number}x", f"other{number}.w")]
        header = {name: entry(0, 0, [0]) for name in (sorted(names) if neighbours else names)}
        file = write(tmp_path / "x.safetensors", compact(header), 0)
        tracemalloc.start()
        try:
            assert len(Modules([read_header(file)])["m"]) == count
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(8000) < 6 * peak(2000)
