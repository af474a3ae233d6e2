"""The JSON files beside the weights: bounded in size, one value for each key, and fields of the kinds that are used."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic_core import from_json

from ..errors import CheckpointError
from .opening import readable

AGAIN = "download it again"
_OBJECT = "the file is one JSON object in UTF-8"
#: Fields of config.json that are counted with; null and absent are the same.
_COUNTS = (
    *("num_experts", "num_local_experts", "n_routed_experts", "num_hidden_layers", "hidden_size"),
    *("moe_intermediate_size", "num_attention_heads", "num_key_value_heads"),
)
_MAX_COUNT = 1 << 31
_MANY = 4096
_STEP = 1 << 20


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
        raise CheckpointError(f"{file.name} is not JSON: {error}", file=file, rule=_OBJECT, remedy=AGAIN) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file.name} is not a JSON object", file=file, rule=_OBJECT, remedy=AGAIN)
    # A key that stands twice leaves a comma more than what is left of the file takes.
    if _count_commas(raw) != _commas(value) and (twice := _first_twice(raw)):
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


def _count_commas(raw: bytes) -> int:
    """As `raw.count(b",")`, which takes seven times as long where there are many."""
    codes, hits, total = np.frombuffer(raw, np.uint8), np.empty(min(len(raw), _STEP), bool), 0
    for start in range(0, len(codes), _STEP):
        part = codes[start : start + _STEP]
        total += int(np.count_nonzero(np.equal(part, ord(","), out=hits[: len(part)])))
    return total


def _commas(value: Any) -> int:
    """The commas of a value's JSON text, those within strings left out."""
    total, stack = 0, [value]
    while stack:
        one = stack.pop()
        if isinstance(one, dict | list) and one:
            total += len(one) - 1
            parts = one.values() if isinstance(one, dict) else one
            # A weight_map has too many to look at each; were there others than strings, a closer look only takes time.
            if len(one) < _MANY or not isinstance(next(iter(parts)), str):
                stack += parts
    return total


def _first_twice(raw: bytes) -> str | None:
    found: list[str] = []

    def look(pairs: list[tuple[str, Any]]) -> None:
        counts = Counter(name for name, _ in pairs)
        found.extend([name for name, count in counts.items() if count > 1])

    # Numbers stay text: Python bounds the digits that it converts.
    json.loads(raw, object_pairs_hook=look, parse_int=str)
    return found[0] if found else None
