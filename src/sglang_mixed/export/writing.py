"""Files written whole or not at all, with their SHA-256."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path

import torch

from ..checkpoint import Read, opened, read_entries, read_into
from .shards import ShardFile

#: What is read, hashed and written at a time.
CHUNK_BYTES = 16 << 20
#: Names of files while they are written.
PARTIAL = ".partial"
#: Told of every number of bytes that are done.
Advance = Callable[[int], object]


def write_shard(folder: Path, shard: ShardFile, advance: Advance) -> str:
    """Write one file under a temporary name and rename it; its SHA-256."""
    return write_file(folder / shard.name, _chunks(shard), advance)


def write_file(file: Path, chunks: Iterator[bytes | memoryview], advance: Advance = lambda nbytes: None) -> str:
    """Write a file under a temporary name, make sure of it on the disk, and rename it; its SHA-256."""
    partial, digest = file.with_name(file.name + PARTIAL), hashlib.sha256()
    try:
        with partial.open("wb") as stream:
            for chunk in chunks:
                stream.write(chunk)
                digest.update(chunk)
                advance(len(chunk))
            stream.flush()
            os.fsync(stream.fileno())
        partial.rename(file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return digest.hexdigest()


def is_written(folder: Path, shard: ShardFile, sha256: str | None, advance: Advance) -> bool:
    """Whether an earlier run has written this very file, of this plan, and the disk still holds it."""
    file = folder / shard.name
    if sha256 is None or not file.is_file() or file.stat().st_size != shard.nbytes:
        return False
    digest, done, header = hashlib.sha256(), 0, len(shard.header)
    with file.open("rb") as stream:
        start = stream.read(header)
        if start != shard.header:
            return False
        digest.update(start)
        advance(header)
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
            advance(len(chunk))
            done += len(chunk)
    if digest.hexdigest() == sha256:
        return True
    advance(-header - done)
    return False


def _chunks(shard: ShardFile) -> Iterator[bytes | memoryview]:
    yield shard.header
    with ExitStack() as files:
        descriptors: dict[Path, int] = {}
        for path, pieces in groupby(shard.pieces, key=lambda piece: piece.path):
            if path not in descriptors:
                descriptors[path] = files.enter_context(opened(path))
            yield from _tensors(descriptors[path], path, [piece.read for piece in pieces])


def _tensors(descriptor: int, path: Path, reads: list[Read]) -> Iterator[bytes | memoryview]:
    """The bytes of these tensors of one file: in chunks, but a part of a matrix that holds several whole."""
    buffer = memoryview(bytearray(CHUNK_BYTES))
    for is_part, group in groupby(reads, key=lambda read: read.entry.view is not None):
        if is_part:
            for _, tensor, _ in read_entries(descriptor, path, list(group), lambda _: None):
                yield tensor.reshape(-1).view(torch.uint8).numpy().data
            continue
        for read in group:
            for place in range(read.entry.begin, read.entry.end, CHUNK_BYTES):
                chunk = buffer[: min(CHUNK_BYTES, read.entry.end - place)]
                read_into(descriptor, path, read.name, place, [chunk])
                yield chunk
