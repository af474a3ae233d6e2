"""A safetensors header looked at tensor after tensor: names the fault that the quick check only knows to be there."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from ..errors import HeaderError, TruncatedFileError
from ..formats.base import ITEM_BYTES, TensorInfo

#: (name, dtype and shape, end in the data) of each tensor, in the order of the bytes.
Places = list[tuple[str, TensorInfo, int]]
MAX_DIMENSIONS = 8
_FIELDS = ("dtype", "shape", "data_offsets")


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as its pairs, so that a key that stands twice is seen."""


DECODER = json.JSONDecoder(object_pairs_hook=_Pairs)


def examine(path: Path, raw: bytes, data_size: int) -> Places:
    """Every tensor of any valid header; else HeaderError or TruncatedFileError with the tensor and the rule."""
    if raw[:1] != b"{":
        _fail(path, None, "the header is not a JSON object", "the header begins with '{'")
    try:
        parsed = json.loads(raw, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as error:
        _fail(path, None, f"the header is not JSON: {error}", "the header is one JSON object in UTF-8")
    assert isinstance(parsed, _Pairs)
    names = [name for name, _ in parsed]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        _fail(path, twice, "the tensor stands twice in the header", "a name stands once")
    entries: dict[str, tuple[int, int, TensorInfo]] = {}
    for name, value in parsed:
        if name.startswith("."):
            _fail(path, name, "the name begins with a dot", "what stands before a name's last dot is its module")
        if name == "__metadata__":
            if not is_metadata(value):
                _fail(path, name, "metadata of another kind", "metadata maps text to text, each name once")
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
    return [(name, info, end) for name, (_, end, info) in ordered]


def is_metadata(value: Any) -> bool:
    """Whether a parsed `__metadata__` maps text to text, each name once."""
    distinct = len({name for name, _ in value}) == len(value) if isinstance(value, _Pairs) else False
    return distinct and all(isinstance(text, str) for _, text in value)


def _examine_entry(path: Path, name: str, value: Any) -> tuple[int, int, TensorInfo]:
    fields = dict(value) if isinstance(value, _Pairs) else {}
    if sorted(fields) != sorted(_FIELDS) or len(value) != len(_FIELDS):
        _fail(path, name, "the entry has other fields", f"an entry has {', '.join(_FIELDS)}, once each")
    dtype, shape, offsets = (fields[key] for key in _FIELDS)
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        _fail(path, name, f"dtype {dtype!r} is not known", f"dtypes that are read: {', '.join(ITEM_BYTES)}")
    if isinstance(shape, list) and len(shape) > MAX_DIMENSIONS:
        _fail(path, name, f"a shape of {len(shape)} dimensions", f"a tensor has at most {MAX_DIMENSIONS} dimensions")
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
