"""Which tensor goes into which file, and every file's header: known before a byte is written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from ..checkpoint import Read, join
from ..formats.base import ITEM_BYTES
from ..plan import Plan


class Piece(NamedTuple):
    """One tensor and the source's file that it is read from."""

    path: Path
    read: Read


@dataclass(frozen=True)
class ShardFile:
    """One file of an export. Tensors stand by falling size of their values, so that each lies aligned to its own."""

    name: str
    pieces: Sequence[Piece]
    fingerprint: str

    @cached_property
    def header(self) -> bytes:
        """The file's bytes before its tensors': length and JSON, as the safetensors library writes them."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt", "plan": self.fingerprint}}
        end = 0
        for _, read in self.pieces:
            begin, end = end, end + read.nbytes
            shape = list(read.entry.shape)
            entries[read.name] = {"dtype": read.entry.dtype, "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(read.nbytes for _, read in self.pieces)


def lay_out(plan: Plan, max_bytes: int) -> list[ShardFile]:
    """The files of at most `max_bytes` of tensors (or one larger tensor), in the model's order."""
    runs: list[list[Piece]] = [[]]
    size = 0
    for piece in _pieces(plan):
        if runs[-1] and size + piece.read.nbytes > max_bytes:
            runs.append([])
            size = 0
        runs[-1].append(piece)
        size += piece.read.nbytes
    return [
        ShardFile(
            f"model-{number:05}-of-{len(runs):05}.safetensors",
            sorted(run, key=lambda piece: -ITEM_BYTES[piece.read.entry.dtype]),
            plan.fingerprint,
        )
        for number, run in enumerate(runs, 1)
    ]


def _pieces(plan: Plan) -> Iterator[Piece]:
    """Every tensor of the plan: modules in the base's order."""
    for module in plan.modules.values():
        checkpoint = plan.checkpoints[module.source]
        for local in module.tensors:
            name = join(module.name, local)
            entry = checkpoint.entries[name]
            yield Piece(checkpoint.files[entry.file], Read(name, entry))
