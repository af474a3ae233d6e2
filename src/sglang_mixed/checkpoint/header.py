"""One safetensors file's header, fully checked: https://huggingface.co/docs/safetensors/index#format.

The file is 8 bytes of header length N (little-endian), N bytes of JSON, then the tensors' bytes without gap or overlap.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from pydantic_core import from_json

from ..errors import HeaderError, MissingFileError, TruncatedFileError
from ..formats.base import ITEM_BYTES, TensorInfo

#: The safetensors library's own bound.
MAX_HEADER_BYTES = 100_000_000
_FIELDS = ("dtype", "shape", "data_offsets")


class Entry(NamedTuple):
    """Where one tensor lies: index of its file, dtype code, shape, and absolute byte positions [begin, end)."""

    file: int
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Shard:
    """One file's tensors in the order of their bytes: `names`, `infos` (shared where alike) and absolute `ends`."""

    path: Path
    names: list[str]
    infos: list[TensorInfo]
    ends: list[int]
    data_begin: int
    digest: bytes

    @cached_property
    def positions(self) -> dict[str, int]:
        """Name -> place in `names`."""
        return {name: position for position, name in enumerate(self.names)}

    def entry(self, file: int, position: int) -> Entry:
        """The entry of the tensor at `position`; `file` is this shard's own index."""
        begin = self.ends[position - 1] if position else self.data_begin
        return Entry(file, *self.infos[position], begin, self.ends[position])


def read_header(path: Path) -> Shard:
    """Read and check one file's header; no tensor byte is read.

    Raises MissingFileError, HeaderError, and TruncatedFileError where the file ends before its tensors do.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise MissingFileError(f"cannot open the file: {error.strerror}", file=path) from error
    try:
        size = os.fstat(descriptor).st_size
        start = os.pread(descriptor, 8, 0)
        length = _header_length(path, start, size)
        raw = os.pread(descriptor, length, 8)
    finally:
        os.close(descriptor)
    try:
        names, infos, ends = _lay_out(raw)
        if ends[-1:] != [size - 8 - length]:
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError):
        # Rare and slow: look at tensor after tensor to name the fault (or to find that there is none).
        names, infos, ends = _examine(path, raw, size - 8 - length)
    begin = 8 + length
    return Shard(path, names, infos, [begin + end for end in ends], begin, hashlib.sha256(raw).digest())


def _header_length(path: Path, start: bytes, size: int) -> int:
    length = int.from_bytes(start, "little")
    if start == b"version ":
        raise HeaderError("the file is a Git LFS pointer, not a checkpoint", file=path, remedy="run: git lfs pull")
    if len(start) < 8:
        raise TruncatedFileError(
            f"the file has {size} bytes",
            file=path,
            rule="a safetensors file begins with 8 bytes of header length",
            remedy="download it again",
        )
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise HeaderError(
            f"the header would be {length} bytes long",
            file=path,
            rule=f"a safetensors header has 2 to {MAX_HEADER_BYTES} bytes",
            remedy="download the file again, or convert it to safetensors",
        )
    if length > size - 8:
        raise TruncatedFileError(
            f"the file ends after {size} bytes, inside its header of {length}",
            file=path,
            rule="the header lies within the file",
            remedy="download it again",
        )
    return length


def _lay_out(raw: bytes) -> tuple[list[str], list[TensorInfo], list[int]]:
    """Names, infos and relative ends in the order of the bytes; ValueError (or its like) at the least doubt.

    Equality with the running sum of the sizes proves every offset at once: no gap, overlap, or wrong size.
    """
    entries = from_json(raw, cache_strings="none")
    metadata = entries.pop("__metadata__", None)
    # Each tensor has ten quotes and each metadatum four: more of them mean a name that stands twice.
    quotes = raw.count(b'"') - raw.count(b'\\"')
    if quotes != 10 * len(entries) + (0 if metadata is None else 2 + 4 * len(metadata)) or raw[0] != 0x7B:
        raise ValueError
    offsets = [entry["data_offsets"] for entry in entries.values()]
    if any(map(list.__gt__, offsets, offsets[1:])):
        entries = dict(sorted(entries.items(), key=lambda item: item[1]["data_offsets"]))
        offsets = [entry["data_offsets"] for entry in entries.values()]
    shapes = [entry["shape"] for entry in entries.values()]
    if not all(type(shape) is list for shape in shapes):
        raise ValueError
    kinds = [_kind(entry["dtype"], *entry["shape"]) for entry in entries.values()]
    ends = list(accumulate([nbytes for _, nbytes in kinds]))
    if offsets != [list(pair) for pair in zip([0, *ends], ends, strict=False)]:
        raise ValueError
    return list(entries), [info for info, _ in kinds], ends


@lru_cache(maxsize=65_536)
def _kind(dtype: str, *shape: int) -> tuple[TensorInfo, int]:
    """One shared TensorInfo per dtype and shape, and its bytes."""
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError
    return TensorInfo(dtype, shape), math.prod(shape) * ITEM_BYTES[dtype]


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as its pairs, so that a key that stands twice is seen."""


def _examine(path: Path, raw: bytes, data_size: int) -> tuple[list[str], list[TensorInfo], list[int]]:
    """The same as `_lay_out`, slowly, raising an error that names the tensor and the rule."""
    try:
        parsed = json.loads(raw, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as error:
        _fail(path, None, f"the header is not JSON: {error}", "the header is one JSON object in UTF-8")
    if not isinstance(parsed, _Pairs) or raw[0] != 0x7B:
        _fail(path, None, "the header is not a JSON object", "the header begins with '{'")
    names = [name for name, _ in parsed]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        _fail(path, twice, "the tensor stands twice in the header", "a name stands once")
    entries: dict[str, tuple[int, int, TensorInfo]] = {}
    for name, value in parsed:
        if name == "__metadata__":
            _examine_metadata(path, value)
        else:
            entries[name] = _examine_entry(path, name, value)
    place = 0
    ordered = sorted(entries.items(), key=lambda item: item[1][:2])
    for name, (begin, end, _) in ordered:
        if begin != place:
            what = f"its bytes begin at {begin}, the ones before it end at {place}"
            _fail(path, name, what, "tensors lie one after another, without gap or overlap")
        place = end
    if place > data_size:
        raise TruncatedFileError(
            f"the file ends {place - data_size} bytes before its last tensor does",
            file=path,
            tensor=next(name for name, (_, end, _) in ordered if end > data_size),
            rule="the tensors' bytes lie within the file",
            remedy="download it again",
        )
    if place < data_size:
        _fail(path, None, f"{data_size - place} bytes belong to no tensor", "the tensors cover the file to its end")
    return [name for name, _ in ordered], [info for _, (_, _, info) in ordered], [end for _, (_, end, _) in ordered]


def _examine_metadata(path: Path, value: Any) -> None:
    if not isinstance(value, _Pairs) or not all(isinstance(text, str) for _, text in value):
        _fail(path, "__metadata__", "metadata of another kind", "metadata maps text to text")


def _examine_entry(path: Path, name: str, value: Any) -> tuple[int, int, TensorInfo]:
    fields = dict(value) if isinstance(value, _Pairs) else {}
    if sorted(fields) != sorted(_FIELDS) or len(value) != len(_FIELDS):
        _fail(path, name, "the entry has other fields", f"an entry has {', '.join(_FIELDS)}, once each")
    dtype, shape, offsets = (fields[key] for key in _FIELDS)
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        _fail(path, name, f"dtype {dtype!r} is not known", f"dtypes that are read: {', '.join(ITEM_BYTES)}")
    if not _are_sizes(shape):
        _fail(path, name, f"shape {shape!r:.80}", "a shape is a list of whole numbers, none negative")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _fail(path, name, f"data_offsets {offsets!r:.80}", "offsets are [begin, end], begin not after end")
    expected = math.prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != expected:
        what = f"{dtype} {list(shape)} takes {expected} bytes, its offsets span {offsets[1] - offsets[0]}"
        _fail(path, name, what, "dtype x shape equals the bytes")
    return offsets[0], offsets[1], TensorInfo(dtype, tuple(shape))


def _are_sizes(value: Any) -> bool:
    return type(value) is list and all(type(size) is int and 0 <= size < 1 << 62 for size in value)


def _fail(path: Path, tensor: str | None, what: str, rule: str) -> NoReturn:
    raise HeaderError(what, file=path, tensor=tensor, rule=rule, remedy="download the file again, or export it again")
