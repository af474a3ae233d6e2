"""Files of a checkpoint as the operating system gives them: links that may be followed, and its refusals as errors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import CheckpointError, MissingFileError


@contextmanager
def readable(file: Path) -> Iterator[None]:
    """What the operating system refuses inside the block is a MissingFileError of ours."""
    try:
        yield
    except OSError as error:
        raise unreadable(file, error) from error


def unreadable(file: Path, error: OSError) -> MissingFileError:
    """The error for what the operating system refused."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    return MissingFileError(
        f"cannot read the file: {reason}", file=file, remedy="check the path, its permissions and the disk"
    )


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A file descriptor for positioned reads."""
    with readable(path):
        descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def is_own_file(file: Path) -> bool:
    """Whether this is a file of its folder, or a link to one that may stand for it; False for what is no file at all.

    Raises CheckpointError for a link that leads out of the folder elsewhere than to a blob of a hub cache.
    """
    with readable(file):
        if not file.is_file():
            return False
        if not file.is_symlink():
            return True
        target, folder = file.resolve(), file.parent.resolve()
    blobs = target.parent
    if target.is_relative_to(folder) or (blobs.name == "blobs" and blobs.parent.name.startswith("models--")):
        return True
    raise CheckpointError(
        f"the file is a link to {target}",
        file=file,
        rule="a link of a checkpoint leads to a file of the same folder, or to a blob of a hub cache",
        remedy="put the file itself there, or name the folder that holds it as the source",
    )
