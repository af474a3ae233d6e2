"""Whether all sources were made from one model: equal configs, and equal norms, routers and embeddings.

These are 16-bit in every quantized checkpoint. At most a few MB a source are read: norms whole, the rest in samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..checkpoint import Checkpoint, Entry, join, opened, read_into
from ..errors import DifferentBaseError
from ..formats.base import ITEM_BYTES
from .families import base_facts, compared, is_embedding, norm_readers

#: |a - b| <= RELATIVE * |a| + ABSOLUTE: one BF16 rounding, or an FP16 one of a small value.
RELATIVE, ABSOLUTE = 2.0**-7, 2.0**-20
_WHOLE, _CHUNK = 8192, 256
#: dtype code and bytes of a module's sampled values.
Sample = tuple[str, bytes]
_FLOATS = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}


class Difference(NamedTuple):
    """The value of a compared tensor that differs most."""

    module: str
    ours: float
    base: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """What of one source differs from the base: `norms` whose readers may compensate for it, and `others`."""

    norms: dict[str, Difference]
    others: dict[str, Difference]


def check_configs(reference: Path, expected: Mapping[str, Any], configs: Mapping[Path, Mapping[str, Any]]) -> None:
    """Raise DifferentBaseError where a config contradicts the base's in a field that shapes the weights."""
    facts = base_facts(expected)
    for path, config in configs.items():
        for key, value in base_facts(config).items():
            if key in facts and facts[key] != value:
                raise DifferentBaseError(
                    f"{key} is {value!r} here and {facts[key]!r} in the base {reference}",
                    file=path / "config.json",
                    rule="all sources are made from one base model",
                    remedy="map to checkpoints of one model, or give --allow-different-base",
                )


def compare_weights(base: Checkpoint, others: Mapping[str, Checkpoint]) -> dict[str, Comparison]:
    """Compare the base's norms, routers and embeddings with each other source's, where both hold them in floats."""
    names = [name for name in compared(base.modules) if _float_weight(base, name)]
    expected = _samples(base, names) if others else {}
    return {source: _compare(base, names, expected, other) for source, other in others.items()}


def _compare(base: Checkpoint, names: list[str], expected: Mapping[str, Sample], other: Checkpoint) -> Comparison:
    shared = [name for name in names if _float_weight(other, name) == _float_weight(base, name)]
    differing = {}
    for name, found in _samples(other, shared).items():
        if found != expected[name] and (difference := _difference(name, found, expected[name])):
            differing[name] = difference
    norms = {name: found for name, found in differing.items() if norm_readers(name, base.modules)}
    # A router that reads a changed norm was changed with it.
    excused = {reader for norm in norms for reader in norm_readers(norm, base.modules)}
    others = {name: found for name, found in differing.items() if name not in norms and name not in excused}
    return Comparison(norms, others)


def different_base(source: str, reference: str, checkpoint: Checkpoint, comparison: Comparison) -> DifferentBaseError:
    """The error for tensors that differ although nothing could compensate for it."""
    found = next(iter(comparison.others.values()))
    return DifferentBaseError(
        f"{source} was made from another model than {reference}: {found.ours:.6g} here, {found.base:.6g} there"
        + (f" ({len(comparison.others)} tensors differ)" if len(comparison.others) > 1 else ""),
        file=checkpoint.file_of(found.module),
        tensor=join(found.module, "weight"),
        rule=f"norms, routers and embeddings are equal: |a - b| <= {RELATIVE:.2g} |a| + {ABSOLUTE:.1g}",
        remedy="map to checkpoints of one model, or give --allow-different-base",
    )


def _float_weight(checkpoint: Checkpoint, module: str) -> tuple[int, ...] | None:
    """The shape of a module's weight if it is held in floats."""
    weight = checkpoint.modules.get(module, {}).get("weight")
    return weight.shape if weight and weight.dtype in ("BF16", *_FLOATS) else None


def _samples(checkpoint: Checkpoint, modules: list[str]) -> dict[str, Sample]:
    """(dtype, bytes) of each module's sampled values; each file is opened once."""
    by_file: dict[int, list[tuple[str, Entry]]] = {}
    for module in modules:
        entry = checkpoint.locate(module, "weight")
        by_file.setdefault(entry.file, []).append((module, entry))
    found = {}
    for file, entries in by_file.items():
        path = checkpoint.files[file]
        with opened(path) as descriptor:
            for module, entry in entries:
                buffer = bytearray()
                for begin, end in _places(module, entry):
                    piece = bytearray(end - begin)
                    read_into(descriptor, path, join(module, "weight"), begin, [memoryview(piece)])
                    buffer += piece
                found[module] = entry.dtype, bytes(buffer)
    return found


def _places(module: str, entry: Entry) -> Iterator[tuple[int, int]]:
    """Byte ranges to read: all of a small tensor, else chunks spread over it."""
    item = ITEM_BYTES[entry.dtype]
    count = (entry.end - entry.begin) // item
    if count <= _WHOLE and len(entry.shape) == 1:
        yield entry.begin, entry.end
        return
    chunks = min(64 if is_embedding(module) else 8, max(1, count // _CHUNK))
    length = min(_CHUNK, count)
    for number in range(chunks):
        first = (count - length) * number // max(1, chunks - 1)
        yield entry.begin + first * item, entry.begin + (first + length) * item


def _difference(module: str, ours: Sample, theirs: Sample) -> Difference | None:
    one, two = _floats(*ours), _floats(*theirs)
    with np.errstate(invalid="ignore"):  # an infinity less an infinity
        excess = np.abs(one - two) - (RELATIVE * np.abs(two) + ABSOLUTE)
    excess = np.where(np.isnan(excess) & ~(np.isnan(one) & np.isnan(two)), np.inf, excess)
    worst = int(np.nanargmax(excess)) if not np.isnan(excess).all() else 0
    return Difference(module, float(one[worst]), float(two[worst])) if excess[worst] > 0 else None


def _floats(dtype: str, raw: bytes) -> npt.NDArray[np.float64]:
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return np.frombuffer(raw, _FLOATS[dtype]).astype(np.float64)
