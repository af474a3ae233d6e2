"""Sources as the commands that write maps are given them: NAME=PATH pairs, or a map whose sources are meant."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..config import MixedPrecisionMap, load_map, locate
from ..errors import MapError

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")


def read_sources(given: Sequence[str], *, allow_different_base: bool = False) -> MixedPrecisionMap:
    """A map without lines. Raises MapError, and MissingFileError for a folder that is not there."""
    if len(given) == 1 and "=" not in given[0]:
        described = load_map(given[0])
        found, default = described.sources, described.default
    else:
        found, default = dict(_pair(text) for text in given), None
    if len(found) < 2 or len(found) < len(given):
        raise MapError(
            f"{len(found)} sources", rule="two or more, each with a name of its own", remedy="give --sources NAME=PATH"
        )
    return MixedPrecisionMap(Path.cwd() / "sources", found, default, allow_different_base=allow_different_base)


def _pair(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not equals or not _NAME.fullmatch(name) or not path:
        raise MapError(
            f"{text!r} names no source",
            rule="NAME=PATH, where a name is letters, digits, _ . and -",
            remedy="write for example fp8=/models/Qwen3-30B-A3B-FP8",
        )
    return name, locate(path, Path.cwd())
