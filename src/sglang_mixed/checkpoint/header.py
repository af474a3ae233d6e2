"""One safetensors file's header, fully checked: https://huggingface.co/docs/safetensors/index#format.

The file is 8 bytes of header length N (little-endian), N bytes of JSON, then the tensors' bytes without gap or overlap.
"""

from __future__ import annotations

import math
import os
import re
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import HeaderError, TruncatedFileError
from ..formats.base import ITEM_BYTES, TensorInfo
from .examine import DECODER, MAX_DIMENSIONS, Places, examine, is_metadata
from .opening import opened, readable

#: The safetensors library's own bound.
MAX_HEADER_BYTES = 100_000_000
_METADATA = '{"__metadata__":'
_SIZES = r"(?:(?:0|[1-9][0-9]*)(?:,(?:0|[1-9][0-9]*))*)?"
#: What the library writes between a module's name and its tensor's offsets: local name, dtype and shape.
_TAIL = re.compile(rf'([^".]+)":\{{"dtype":"([A-Z0-9_]+)","shape":\[({_SIZES})\],"data_offsets":')
_MAX_PARTS = 65_536


class View(NamedTuple):
    """A tensor inside a stored matrix of this shape: its transpose if `transposed`, then rows first, first + step, ...

    `text` says the same of the file's tensor, for reports: `model.layers.0.mlp.experts.gate_up_proj[3, :, 0::2].T`.
    """

    text: str
    shape: tuple[int, ...]
    transposed: bool
    first: int
    step: int

    @property
    def is_run(self) -> bool:
        """Whether the tensor's bytes lie one after another."""
        return not self.transposed and self.step == 1


class Entry(NamedTuple):
    """Where one tensor lies: index of its file, dtype code, shape, and absolute byte positions [begin, end).

    With a `view` these are the positions of the stored matrix that the tensor is a part of.
    """

    file: int
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    view: View | None = None


class Part(NamedTuple):
    """One tensor of a module, whichever module that is: local name, dtype and shape, bytes. Shared where alike."""

    local: str
    info: TensorInfo
    nbytes: int


class Stamp(NamedTuple):
    """By what a change of a file is noticed: bytes, time of the last write (ns), CRC-32 of the header."""

    size: int
    modified: int
    header: int


@dataclass(frozen=True)
class Shard:
    """One file's tensors in the order of their bytes: the module and part of each, and where it ends in the data."""

    path: Path
    modules: list[str]
    parts: list[Part]
    ends: list[int]
    data_begin: int
    stamp: Stamp

    @cached_property
    def names(self) -> list[str]:
        """Full tensor names."""
        return [
            f"{module}.{part[0]}" if module else part[0] for module, part in zip(self.modules, self.parts, strict=True)
        ]

    def find(self, module: str, local: str, start: int = 0) -> int | None:
        """The position of one tensor, by search from `start` on, then before it."""
        position = start - 1
        try:
            while True:
                position = self.modules.index(module, position + 1)
                if self.parts[position].local == local:
                    return position
        except ValueError:
            return self.find(module, local) if start else None

    def entry(self, file: int, position: int) -> Entry:
        """The entry of the tensor at `position`; `file` is the shard's own index."""
        begin = self.ends[position - 1] if position else 0
        return Entry(file, *self.parts[position].info, self.data_begin + begin, self.data_begin + self.ends[position])


def read_header(path: Path) -> Shard:
    """Read and check one file's header, but for names that stand twice, which `Modules` sees; no tensor byte is read.

    Raises MissingFileError, HeaderError, and TruncatedFileError where the file ends before its tensors do.
    """
    with opened(path) as descriptor, readable(path):
        status = os.fstat(descriptor)
        size = status.st_size
        start = os.pread(descriptor, 9, 0)
        length = _header_length(path, start[:8], size)
        # What is no header is not read whole first: it may be long.
        raw = os.pread(descriptor, length, 8) if start[8:] == b"{" else start[8:]
    try:
        places = _lay_out(raw, size - 8 - length)
    except (ValueError, RecursionError):
        # Rare and slow: look at tensor after tensor to name the fault (or to find that there is none).
        places = _split(examine(path, raw, size - 8 - length))
    return Shard(path, *places, 8 + length, Stamp(size, status.st_mtime_ns, zlib.crc32(raw)))


def _header_length(path: Path, start: bytes, size: int) -> int:
    length = int.from_bytes(start, "little")
    if start == b"version ":
        raise HeaderError(
            "the file is a Git LFS pointer, not a checkpoint",
            file=path,
            rule="a safetensors file starts with the length of its header",
            remedy="run: git lfs pull",
        )
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


def _lay_out(raw: bytes, data_size: int) -> tuple[list[str], list[Part], list[int]]:
    """Modules, parts and ends of a header as the safetensors library writes it; ValueError for any other.

    Each entry is cut into module, tail and offsets, which together are its whole text. The tail is one that was matched
    in full, the offsets are the text of the running sum of the sizes, and no quote is left for the module: so every
    byte is as it must be, at less than the cost of parsing JSON.
    """
    text = str(raw, "ascii").rstrip(" ")
    start = _after_metadata(text)
    codes = np.frombuffer(raw, np.uint8)[start:]
    if text.find("\\", start) >= 0 or codes.min() < 0x20 or not text.endswith("]}}"):
        raise ValueError
    modules, parts, ends = [], [], []
    end, begins_at = 0, "0"
    for entry in text[start:-3].split(']},"'):
        head, _, offsets = entry.rpartition("[")
        module, _, tail = head.rpartition(".")
        part = _PARTS.get(tail) or _parse_tail(tail)
        end += part[2]
        ends_at = str(end)
        if offsets != f"{begins_at},{ends_at}":
            raise ValueError
        begins_at = ends_at
        modules.append(module)
        parts.append(part)
        ends.append(end)
    # Ten quotes a tensor, the first of them before `start`.
    if "" in modules or end != data_size or np.count_nonzero(codes == 0x22) != 10 * len(modules) - 1:
        raise ValueError
    return modules, parts, ends


def _after_metadata(text: str) -> int:
    """Where the first tensor's name begins."""
    start = 1
    if text.startswith(_METADATA):
        metadata, start = DECODER.raw_decode(text, len(_METADATA))
        if not is_metadata(metadata) or text[start : start + 1] != ",":
            raise ValueError
        start += 1
    if text[:1] != "{" or text[start : start + 1] != '"':
        raise ValueError
    return start + 1


_PARTS: dict[str, Part] = {}


def _parse_tail(tail: str) -> Part:
    found = _TAIL.fullmatch(tail)
    if not found or found[2] not in ITEM_BYTES or found[1] == "__metadata__" or found[3].count(",") >= MAX_DIMENSIONS:
        raise ValueError
    if len(_PARTS) >= _MAX_PARTS:
        _PARTS.clear()
    part = _PARTS[tail] = make_part(found[1], found[2], tuple(int(size) for size in found[3].split(",") if size))
    return part


def make_part(local: str, dtype: str, shape: tuple[int, ...]) -> Part:
    """A part of these values."""
    return Part(local, TensorInfo(dtype, shape), math.prod(shape) * ITEM_BYTES[dtype])


def _split(places: Places) -> tuple[list[str], list[Part], list[int]]:
    """The examined places as `_lay_out` gives them."""
    shared: dict[Part, Part] = {}
    modules, parts = [], []
    for name, info, _ in places:
        module, _, local = name.rpartition(".")
        part = make_part(local, *info)
        modules.append(module)
        parts.append(shared.setdefault(part, part))
    return modules, parts, [end for _, _, end in places]
