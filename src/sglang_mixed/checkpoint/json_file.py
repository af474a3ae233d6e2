"""The JSON files beside the weights: bounded in size, one value for each key, and fields of the kinds that are used."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from ..errors import CheckpointError, MissingFileError

AGAIN = "download it again"
#: Fields of config.json that are counted with; null and absent are the same.
_COUNTS = (
    *("num_experts", "num_local_experts", "n_routed_experts", "num_hidden_layers", "hidden_size"),
    *("moe_intermediate_size", "num_attention_heads", "num_key_value_heads"),
)
_MAX_COUNT = 1 << 31


def read_object(file: Path, bound: int) -> dict[str, Any]:
    """The object of a JSON file of at most `bound` bytes. Raises CheckpointError, for a key that stands twice too."""
    with readable(file):
        size = file.stat().st_size
        if size > bound:
            raise CheckpointError(f"{file.name} has {size} bytes", file=file, rule=f"at most {bound} bytes")
        raw = file.read_bytes()
    try:
        value = from_json(raw, cache_strings="none")
    except ValueError as error:
        raise CheckpointError(f"{file.name} is not JSON: {error}", file=file, remedy=AGAIN) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file.name} is not a JSON object", file=file, remedy=AGAIN)
    # A key that stands twice leaves a comma more than what is left of the file takes.
    if raw.count(b",") != _commas(value) and (twice := _first_twice(raw)):
        raise CheckpointError(
            f"the key {twice!r} stands twice",
            file=file,
            rule="a key stands once in its object: readers differ in which of two they take",
            remedy=AGAIN,
        )
    return value


def check_fields(file: Path, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError where a field of config.json that decides something is of another kind than it must be."""
    for section in (config, config.get("text_config")):
        for key, value in section.items() if isinstance(section, Mapping) else ():
            if value is not None and (expected := _expected(key, value)):
                raise CheckpointError(
                    f"{key} is {value!r:.80}",
                    file=file,
                    rule=f"{key} is {expected}",
                    remedy="restore the model's own config.json",
                )


def _expected(key: str, value: Any) -> str | None:
    """What a field must be, if it is not that."""
    if key in _COUNTS:
        fits = type(value) is int and 0 <= value <= _MAX_COUNT
        return None if fits else f"a whole number of at most {_MAX_COUNT}"
    if key == "architectures":
        fits = isinstance(value, list) and all(isinstance(name, str) for name in value)
        return None if fits else "a list of names"
    if key == "model_type":
        return None if isinstance(value, str) else "a name"
    if key in ("quantization_config", "compression_config", "text_config"):
        return None if isinstance(value, Mapping) else "an object"
    return None


@contextmanager
def readable(file: Path) -> Iterator[None]:
    """What the operating system refuses inside the block is a MissingFileError of ours."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise MissingFileError(
            f"cannot read the file: {reason}", file=file, remedy="check the path, its permissions and the disk"
        ) from error


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


def _commas(value: Any) -> int:
    """The commas of a value's JSON text, those within strings left out."""
    total, stack = 0, [value]
    while stack:
        one = stack.pop()
        if isinstance(one, dict | list) and one:
            total += len(one) - 1
            # A weight_map holds strings only, and many.
            stack += [part for part in (one.values() if isinstance(one, dict) else one) if type(part) is not str]
    return total


def _first_twice(raw: bytes) -> str | None:
    found: list[str] = []

    def look(pairs: list[tuple[str, Any]]) -> None:
        counts = Counter(name for name, _ in pairs)
        found.extend([name for name, count in counts.items() if count > 1])

    # Numbers stay text: Python bounds the digits that it converts.
    json.loads(raw, object_pairs_hook=look, parse_int=str)
    return found[0] if found else None
