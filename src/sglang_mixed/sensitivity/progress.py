"""What a long measurement has found so far, a line for each part, so that it goes on where it was stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from ..errors import SensitivityError

#: source -> error, of one unit or module.
Found = dict[str, float]


class Progress:
    """The parts that are done. With a file each is appended to it at once; a line cut short by a crash is dropped.

    The first line says what is measured: a file of another measurement is refused with SensitivityError.
    """

    def __init__(self, path: Path | None = None, facts: Mapping[str, Any] | None = None) -> None:
        self.done: dict[str, Found] = {}
        self._path, self._file = path, None if path is None else self._open(path, facts)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def save(self, name: str, errors: Found) -> None:
        """One more part is done."""
        self.done[name] = errors
        if self._file is not None:
            _append(self._file, {"name": name, "errors": errors})

    def by_source(self) -> dict[str, dict[str, float]]:
        """source -> part -> error, of all that is done."""
        errors: dict[str, dict[str, float]] = {}
        for name, found in self.done.items():
            for source, value in found.items():
                errors.setdefault(source, {})[name] = value
        return errors

    def finish(self) -> None:
        """The result stands elsewhere: the file goes."""
        if self._path is not None:
            self._path.unlink()

    def _open(self, path: Path, facts: Mapping[str, Any] | None) -> TextIO:
        try:
            lines = _whole_lines(path)
            if lines and lines[0] != facts:
                raise SensitivityError(
                    "the file holds the progress of another measurement",
                    file=path,
                    rule="sources, text and settings are those that it was begun with",
                    remedy="delete the file, or measure as before",
                )
            self.done = {line["name"]: line["errors"] for line in lines[1:]}
            file = path.open("a")
        except OSError as error:
            raise SensitivityError(f"cannot be written: {error.strerror}", file=path) from error
        if not lines:
            _append(file, facts)
        return file


def _append(file: TextIO, line: Any) -> None:
    file.write(json.dumps(line) + "\n")
    file.flush()


def _whole_lines(path: Path) -> list[Any]:
    """The lines that were written to their end; the rest of the file is cut off."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    os.truncate(path, whole)
    try:
        return [json.loads(line) for line in data[:whole].splitlines()]
    except ValueError as error:
        raise SensitivityError(f"not a file of progress: {error}", file=path, remedy="delete the file") from error
