"""One safetensors file's header, fully checked: https://huggingface.co/docs/safetensors/index#format.

The file is 8 bytes of header length N (little-endian), N bytes of JSON, then the tensors' bytes without gap or overlap.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import numpy as np

from ..errors import HeaderError, TruncatedFileError
from .examine import DECODER, Places, examine, is_metadata
from .opening import opened, readable
from .shard import Part, Parts, Shard, Stamp
from .step import Step

#: The safetensors library's own bound.
MAX_HEADER_BYTES = 100_000_000
_METADATA = '{"__metadata__":'
#: Modules, parts and begins of a file's runs, as a Shard has them.
Runs = tuple[list[str], list[Parts], list[int]]


def read_header(path: Path, first: Step | None = None) -> Shard:
    """Read and check one file's header, but for names that stand twice, which `Modules` sees; no tensor byte is read.

    `first` is a step without a tensor; files that are given the same one share what is alike in them.

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
        places = _lay_out(raw, size - 8 - length, first or Step())
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


def _lay_out(raw: bytes, data_size: int, first: Step) -> Runs:
    """The runs of a header as the safetensors library writes it; ValueError for any other.

    Each entry is cut into module, tail and offsets, which together are its whole text. The tail is one that was matched
    in full, the offsets are the text of the running sum of the sizes, and no quote is left for the module: so every
    byte is as it must be, at less than the cost of parsing JSON. Cheaper still is an entry that is what was expected.
    """
    text = str(raw, "ascii").rstrip(" ")
    start = _after_metadata(text)
    codes = np.frombuffer(raw, np.uint8)[start:]
    if text.find("\\", start) >= 0 or codes.min() < 0x20 or not text.endswith("]}}"):
        raise ValueError
    entries = text[start:-3].split(']},"')
    modules, lasts, begins = [], [], []
    step, module, end, begins_at, firsts = first, None, 0, "0", first.known
    for entry in entries:
        if (expected := step.expected) is not None:
            ends_at = str(end + expected.nbytes)
            if entry == f"{module}.{expected.tail}[{begins_at},{ends_at}":
                step, begins_at = expected, ends_at
                end += expected.nbytes
                continue
        head, _, offsets = entry.rpartition("[")
        owner, _, tail = head.rpartition(".")
        if owner == module:
            following = step.after(tail)
            step.expected = step = following
        else:
            step.expected = None
            lasts.append(step)
            modules.append(owner)
            begins.append(end)
            step, module = firsts.get(tail) or first.after(tail), owner
        end += step.nbytes
        ends_at = str(end)
        if offsets != f"{begins_at},{ends_at}":
            raise ValueError
        begins_at = ends_at
    lasts.append(step)
    # Ten quotes a tensor, the first of them before `start`.
    if "" in modules or end != data_size or np.count_nonzero(codes == 0x22) != 10 * len(entries) - 1:
        raise ValueError
    return modules, [last.parts for last in lasts[1:]], begins


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


def _split(places: Places) -> Runs:
    """The examined places as `_lay_out` gives them."""
    alike: dict[Parts, Parts] = {}
    modules, runs, begins, begin = [], [], [], 0
    for name, info, end in places:
        module, _, local = name.rpartition(".")
        parts = (Part.of(local, info),)
        modules.append(module)
        runs.append(alike.setdefault(parts, parts))
        begins.append(begin)
        begin = end
    return modules, runs, begins
