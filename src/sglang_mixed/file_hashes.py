"""SHA-256 of planned tensors as their files hold them, by a process of its own.

    python -m sglang_mixed.file_hashes < a pickled Request > pickled tuples, one a tensor

The scheduler of a GPU never sleeps: a thread beside it would wait for Python's lock several times a tensor, and would
take it away from requests. This process runs at a lower priority, and ends when nobody reads its answers.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

import torch

from .digests import sha256, sha256_tree
from .errors import MixedPrecisionError, ProofError
from .stream import FileRead, ReadLog, stream

READERS = 4
#: Added to the niceness of the process.
NICENESS = 10


class Request(NamedTuple):
    """What to read, and full name -> torch dtype of tensors that memory holds in another dtype than the file."""

    reads: Sequence[FileRead]
    casts: Mapping[str, str]


class FileHash(NamedTuple):
    """SHA-256 of a tensor in its file, and of its values in the dtype that memory holds; of those also the tree's."""

    name: str
    in_file: str
    as_held: str
    tree: str | None = None


def hash_tensor(name: str, tensor: torch.Tensor, casts: Mapping[str, str], tree: bool = False) -> FileHash:
    """Of a tensor that was read; with `tree`, as a GPU hashes what it holds."""
    cast = casts.get(name)
    held = tensor.to(getattr(torch, cast)) if cast else tensor
    in_file = sha256(tensor)
    return FileHash(name, in_file, sha256(held) if cast else in_file, sha256_tree(held) if tree else None)


def hash_files(request: Request) -> Iterator[FileHash]:
    """Start the process and yield its answers. Raises ProofError if it cannot read a file, or ends early."""
    command = [sys.executable, "-m", __name__]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile() as errors,  # a pipe that nobody reads yet could fill up
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, env=environment) as process,
    ):
        assert process.stdin and process.stdout
        try:
            process.stdin.write(pickle.dumps(request))
            process.stdin.close()
            with suppress(EOFError, pickle.UnpicklingError):
                while True:
                    yield FileHash(*pickle.load(process.stdout))
            if process.wait():
                errors.seek(0)
                raise ProofError(
                    "the files could not be read a second time",
                    rule=errors.read().decode(errors="replace").strip()[-2000:],
                    remedy="check that the sources are still there and readable; then restart",
                )
        finally:
            process.kill()


def main() -> None:
    """What the process does."""
    os.nice(NICENESS)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with the server, not before
    torch.set_num_threads(1)
    request: Request = pickle.load(sys.stdin.buffer)
    writing = threading.Lock()

    def answer(name: str, tensor: torch.Tensor) -> None:
        found = hash_tensor(name, tensor, request.casts, tree=True)
        with writing:
            pickle.dump(tuple(found), sys.stdout.buffer)
            sys.stdout.buffer.flush()

    try:
        for _ in stream(request.reads, ReadLog(), receive=answer, readers=READERS):
            pass
    except MixedPrecisionError as error:
        sys.exit(str(error))
    except BrokenPipeError:
        os._exit(0)


if __name__ == "__main__":
    main()
