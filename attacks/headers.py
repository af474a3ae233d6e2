"""Headers of safetensors files that lie or break the format."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

from sglang_mixed.errors import HeaderError, TruncatedFileError

from .base import SINGLE, Attack, edit_header, join, split

NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"
Header = dict[str, Any]


def _length(length: int) -> Any:
    def build(folder: Path) -> None:
        header, data = split(folder / "bf16" / SINGLE)
        join(folder / "bf16" / SINGLE, header, data, length)

    return build


def _bytes(raw: bytes) -> Any:
    return lambda folder: (folder / "bf16" / SINGLE).write_bytes(raw)


def _cut(share: float) -> Any:
    def build(folder: Path) -> None:
        raw = (folder / "bf16" / SINGLE).read_bytes()
        (folder / "bf16" / SINGLE).write_bytes(raw[: int(len(raw) * share)] if share < 1 else raw[:-1])

    return build


def _more(folder: Path) -> None:
    with (folder / "bf16" / SINGLE).open("ab") as file:
        file.write(bytes(64))


def _text(old: str, new: str) -> Any:
    """The header's text with its first `old` replaced."""
    return edit_header(lambda header: json.dumps(header, separators=(",", ":")).replace(old, new, 1).encode())


def _twice(header: Header) -> bytes:
    return _append(header, f',"{NORM}":{json.dumps(header[NORM])}')


def _twice_escaped(header: Header) -> bytes:
    return _append(header, f',"\\u006d{NORM[1:]}":{json.dumps(header[NORM])}')


def _append(header: Header, text: str) -> bytes:
    return json.dumps(header).encode()[:-1] + text.encode() + b"}"


def _shift(begin: int, end: int) -> Any:
    def change(header: Header) -> None:
        one = max(header, key=lambda name: header[name]["data_offsets"][0] if name != "__metadata__" else -1)
        first, last = header[one]["data_offsets"]
        header[one]["data_offsets"] = [first + begin, last + end]

    return edit_header(change)


def _offsets(*offsets: int) -> Any:
    return edit_header(lambda header: header[NORM].update(data_offsets=list(offsets)))


def _shape(*shape: Any) -> Any:
    return edit_header(lambda header: header[NORM].update(shape=list(shape)))


def _dtype(dtype: Any) -> Any:
    return edit_header(lambda header: header[NORM].update(dtype=dtype))


_ONE = json.dumps({"dtype": "U8", "shape": [1], "data_offsets": [0, 1]})
ATTACKS = [
    Attack("a header of 2^40 bytes", _length(1 << 40), HeaderError, "header has 2 to", SINGLE),
    Attack("a header of 2^64 - 1 bytes", _length((1 << 64) - 1), HeaderError, "header has 2 to", SINGLE),
    Attack("a header of 90 MB in a small file", _length(90_000_000), TruncatedFileError, "within the file", SINGLE),
    Attack("a header of no bytes", _length(0), HeaderError, "header has 2 to", SINGLE),
    Attack("a header length one byte short", edit_header(lambda header: json.dumps(header).encode()[:-1]), HeaderError, "one JSON object", SINGLE),
    Attack("an empty file", _bytes(b""), TruncatedFileError, "8 bytes of header length", SINGLE),
    Attack("a Git LFS pointer", _bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"), HeaderError, "starts with the length", SINGLE),
    Attack("a pickle under the name of a safetensors file", _bytes(pickle.dumps({"a": print})), HeaderError, "header has 2 to", SINGLE),
    Attack("an HTML page of a failed download", _bytes(b"<!DOCTYPE html><html><body>404</body></html>"), HeaderError, "header has 2 to", SINGLE),
    Attack("a header that is not JSON", edit_header(lambda _: b"{'a': 1}"), HeaderError, "one JSON object", SINGLE),
    Attack("a header that is a list", edit_header(lambda _: b"[1, 2]"), HeaderError, "begins with '{'", SINGLE),
    Attack("a header that is not UTF-8", edit_header(lambda _: b'{"\xff": 1}'), HeaderError, "one JSON object", SINGLE),
    Attack("100,000 nested lists", edit_header(lambda _: b'{"a":' + b"[" * 100_000), HeaderError, "one JSON object", SINGLE),
    Attack("a tensor named twice", edit_header(_twice), HeaderError, "stands once", SINGLE, NORM),
    Attack("a tensor named twice, once escaped", edit_header(_twice_escaped), HeaderError, "stands once", SINGLE, NORM),
    Attack("a field given twice", _text('"dtype"', '"dtype":"F32","dtype"'), HeaderError, "once each", SINGLE),
    Attack("a field missing", edit_header(lambda header: header[NORM].pop("shape") and None), HeaderError, "an entry has", SINGLE, NORM),
    Attack("a negative offset", _offsets(-128, 0), HeaderError, "begin not after end", SINGLE, NORM),
    Attack("offsets the wrong way round", _offsets(128, 0), HeaderError, "begin not after end", SINGLE, NORM),
    Attack("offsets past 2^70", _offsets(1 << 70, (1 << 70) + 128), HeaderError, "begin not after end", SINGLE, NORM),
    Attack("two tensors on the same bytes", _shift(-2, -2), HeaderError, "without gap or overlap", SINGLE),
    Attack("a gap between tensors", _shift(2, 2), HeaderError, "without gap or overlap", SINGLE),
    Attack("bytes at the end that no tensor covers", _more, HeaderError, "to its end", SINGLE),
    Attack("a file cut short by a byte", _cut(1), TruncatedFileError, "within the file", SINGLE),
    Attack("a file cut in half", _cut(0.5), TruncatedFileError, "within the file", SINGLE),
    Attack("a file cut inside its header", _cut(0.001), TruncatedFileError, "within the file", SINGLE),
    Attack("a shape whose product overflows 64 bits", _shape(1 << 40, 1 << 40), HeaderError, "equals the bytes", SINGLE, NORM),
    Attack("a shape of 2^70", _shape(1 << 70), HeaderError, "whole numbers", SINGLE, NORM),
    Attack("a shape of 1,000 dimensions", _shape(*[1] * 999, 64), HeaderError, "at most 8 dimensions", SINGLE, NORM),
    Attack("a negative size", _shape(-64), HeaderError, "whole numbers", SINGLE, NORM),
    Attack("NaN as a size", _shape(float("nan")), HeaderError, "whole numbers", SINGLE, NORM),
    Attack("Infinity as a size", _shape(float("inf")), HeaderError, "whole numbers", SINGLE, NORM),
    Attack("a fraction as a size", _shape(64.0), HeaderError, "whole numbers", SINGLE, NORM),
    Attack("true as a size", _shape(True, 64), HeaderError, "whole numbers", SINGLE, NORM),
    Attack("a dtype nobody knows", _dtype("F128"), HeaderError, "dtypes that are read", SINGLE, NORM),
    Attack("a dtype wider than the bytes", _dtype("F32"), HeaderError, "equals the bytes", SINGLE, NORM),
    Attack("metadata that is no text", edit_header(lambda header: header.update(__metadata__={"a": 1})), HeaderError, "text to text", SINGLE, "__metadata__"),
    Attack("a name of 5,000 parts", edit_header(lambda header: header.update({"a." * 5000 + "weight": header.pop(NORM)})), HeaderError, "at most 1000", "bf16"),
    Attack("a name that begins with a dot", edit_header(lambda header: header.update({".x": header.pop(NORM)})), HeaderError, "last dot", SINGLE, ".x"),
]  # fmt: skip
