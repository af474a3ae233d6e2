"""The YAML map: which source each weight comes from. Nothing else in the package reads YAML.

`load_map` is strict: an unknown key, a duplicate, an undeclared source, a malformed pattern is an error with its line.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import (
    MapSyntaxError,
    MissingFileError,
    PatternError,
    UnknownKeyError,
    UnknownSourceError,
    nearest,
)
from .patterns import Pattern, parse_pattern
from .yaml_lines import Document, read_yaml

SECTION = "mixed_precision"
_RULE = "the sections are mixed_precision (NAME_path, default, weight_mapping), inference and server, each a mapping"
_RULES: dict[tuple[str, ...], str] = {
    (
        SECTION,
    ): "NAME_path is a path, default and what weight_mapping maps to are names of sources: quote what YAML takes "
    "for something else (no, on, 1)",
    ("inference",): "max_seq_length and max_batch_size are whole numbers from 1, dtype and device_map names",
    ("server",): "port is a whole number up to 65535, max_workers one from 1, host a name",
}
USUAL_SOURCES = ("fp16_path", "bf16_path", "fp8_path", "int8_path", "int4_path", "gptq_int4_path", "awq_int4_path")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Inference(_Section):
    """`inference:` of the map; each key that is given becomes an SGLang argument."""

    max_seq_length: int | None = Field(default=None, ge=1)
    max_batch_size: int | None = Field(default=None, ge=1)
    dtype: Literal["auto", "half", "float16", "bfloat16", "float", "float32"] | None = None
    device_map: str | None = None


class Server(_Section):
    """`server:` of the map; each key that is given becomes an SGLang argument."""

    host: str | None = None
    port: int | None = Field(default=None, ge=1, le=65535)
    max_workers: int | None = Field(default=None, ge=1)


class _Mixed(_Section):
    sources: dict[str, str]
    default: str | None = None
    weight_mapping: dict[str, str] = Field(default_factory=dict)


class _File(_Section):
    mixed_precision: _Mixed
    inference: Inference = Inference()
    server: Server = Server()


class Rule(NamedTuple):
    """One line of `weight_mapping`: the modules that `pattern` names come from `source`."""

    pattern: str
    source: str
    line: int


@dataclass(frozen=True, slots=True)
class MixedPrecisionMap:
    """A checked map. `sources`: name -> existing folder (absolute), in the order of the file; `rules` likewise.

    `allow_different_base` is no YAML key: a flag sets it, and it travels with the map.
    """

    path: Path
    sources: dict[str, Path]
    default: str | None = None
    rules: tuple[Rule, ...] = ()
    inference: Inference = field(default_factory=Inference)
    server: Server = field(default_factory=Server)
    allow_different_base: bool = False

    def patterns(self) -> list[Pattern]:
        """The parsed pattern of each rule, in order."""
        return [_parse_rule(rule, self.path) for rule in self.rules]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values with absolute paths: other processes and nodes rebuild the map from it."""
        return {
            "path": str(self.path),
            "sources": {name: str(path) for name, path in self.sources.items()},
            "default": self.default,
            "rules": [list(rule) for rule in self.rules],
            "inference": self.inference.model_dump(exclude_none=True),
            "server": self.server.model_dump(exclude_none=True),
            "allow_different_base": self.allow_different_base,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> MixedPrecisionMap:
        """The map that `to_json` wrote."""
        return cls(
            path=Path(value["path"]),
            sources={name: Path(path) for name, path in value["sources"].items()},
            default=value["default"],
            rules=tuple(Rule(*rule) for rule in value["rules"]),
            inference=Inference.model_validate(value["inference"]),
            server=Server.model_validate(value["server"]),
            allow_different_base=value["allow_different_base"],
        )


def load_map(path: str | Path) -> MixedPrecisionMap:
    """Read and check a YAML map; a checkpoint folder in its place is the map that takes everything from it.

    >>> load_map("mix.yaml").sources["fp8"]                                             # doctest: +SKIP
    PosixPath('/models/Qwen3-30B-A3B-FP8')
    """
    file = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow links, and relative paths mean this folder
    if file.is_dir():
        return MixedPrecisionMap(file, {"checkpoint": file})
    if not file.exists():
        raise MissingFileError(
            f"mixed precision config file does not exist: {path}", file=file, remedy="give the path of a YAML map"
        )
    document = read_yaml(file)
    parsed = _validate(document)
    mixed = parsed.mixed_precision
    sources = {
        name: locate(text, file.parent, file=file, line=document.line(SECTION, f"{name}_path"))
        for name, text in mixed.sources.items()
    }
    _check_source(document, mixed.default, sources, "default")
    rules = []
    for pattern, source in mixed.weight_mapping.items():
        _check_source(document, source, sources, "weight_mapping", pattern)
        rules.append(Rule(pattern, source, document.line(SECTION, "weight_mapping", pattern)))
        _parse_rule(rules[-1], file)
    return MixedPrecisionMap(file, sources, mixed.default, tuple(rules), parsed.inference, parsed.server)


def locate(text: str, folder: Path, *, file: Path | None = None, line: int | None = None) -> Path:
    """The checkpoint folder that `text` means: a path (relative to `folder`) or a hub name in the local cache."""
    path, reason = folder / text, ""
    try:
        path = folder / Path(text).expanduser()
        if path.is_dir():
            return Path(os.path.abspath(path))  # noqa: PTH100 - keep links: a cache snapshot consists of them
        snapshot = _hub_snapshot(text)
        if snapshot is not None:
            return snapshot
        reason = ", but a file of that name" if path.exists() else ""
    except (OSError, RuntimeError, ValueError) as error:
        # A name too long or without right of access; a ~user that is nobody; a reference file that is no text.
        reason = f": {getattr(error, 'strerror', None) or error}"
    raise MissingFileError(
        f"no checkpoint folder {text[:200]!r}{reason}",
        file=file or path,
        line=line,
        rule="a source is a folder with config.json and .safetensors files, or a hub name in the local cache",
        remedy=f"correct the path, or run: hf download {text}" if text.count("/") == 1 else "correct the path",
    )


def _hub_snapshot(name: str) -> Path | None:
    organisation, slash, model = name.partition("/")
    if not slash or "/" in model or not organisation or not model or ".." in name:
        return None
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    repository = hub / f"models--{organisation}--{model}"
    reference = repository / "refs" / "main"
    if not reference.is_file():
        return None
    snapshot = repository / "snapshots" / reference.read_text().strip()
    return snapshot if snapshot.is_dir() else None


def _parse_rule(rule: Rule, file: Path) -> Pattern:
    try:
        return parse_pattern(rule.pattern)
    except PatternError as error:
        raise PatternError(error.what, file=file, line=rule.line, rule=error.rule, remedy=error.remedy) from None


def _check_source(document: Document, name: str | None, sources: Mapping[str, Path], *keys: str) -> None:
    if name is None or name in sources:
        return
    raise UnknownSourceError(
        f"unknown source {name!r}{nearest(name, sources)}",
        file=document.file,
        line=document.line(SECTION, *keys),
        rule="a source NAME is declared by a key NAME_path",
        remedy=f"declare {name}_path, or use one of: {', '.join(sources)}",
    )


def _validate(document: Document) -> _File:
    value = dict(document.value)
    section = value.get(SECTION)
    if isinstance(section, dict):
        value[SECTION] = _gather_sources(document, section)
    elif SECTION in value:
        raise _syntax(document, f"{SECTION!r} is not a mapping", SECTION)
    try:
        return _File.model_validate(value)
    except ValidationError as error:
        _refuse(document, error)


def _gather_sources(document: Document, section: Mapping[str, Any]) -> dict[str, Any]:
    """Move every `NAME_path` key below `sources`, which is no key a map may have itself."""
    rest = {key: value for key, value in section.items() if not key.endswith("_path")}
    if "sources" in rest:
        raise _unknown_key(document, (SECTION, "sources"), USUAL_SOURCES)
    sources = {key.removesuffix("_path"): value for key, value in section.items() if key not in rest}
    if not all(sources):
        raise _syntax(document, "a source without a name", SECTION, "_path")
    if not sources:
        raise _syntax(document, "no source is declared: add at least one NAME_path", SECTION)
    return {**rest, "sources": sources}


def _refuse(document: Document, error: ValidationError) -> NoReturn:
    """Our error for the first thing pydantic found, at its line."""
    # A misspelt key is unknown and missing at once: the former says more.
    first = min(error.errors(include_url=False), key=lambda found: found["type"] != "extra_forbidden")
    keys = tuple(str(key) for key in first["loc"])
    if keys[:2] == (SECTION, "sources"):
        keys = (SECTION, f"{keys[2]}_path")
    if first["type"] == "extra_forbidden":
        raise _unknown_key(document, keys, _known_keys(keys[:-1])) from None
    if first["type"] == "missing":
        raise _syntax(document, f"the key {keys[-1]!r} is missing") from None
    keys = keys[:-1] if keys[-1] == "[key]" else keys
    given = first["input"]
    what = f"{'.'.join(keys)}: {first['msg'][0].lower()}{first['msg'][1:]}, not {given!r:.80}"
    raise _syntax(document, what, *keys) from None


def _known_keys(section: tuple[str, ...]) -> list[str]:
    if not section:
        return list(_File.model_fields)
    if section == (SECTION,):
        return ["default", "weight_mapping", *USUAL_SOURCES]
    return list(type(_File.model_fields[section[0]].default).model_fields)


def _unknown_key(document: Document, keys: tuple[str, ...], known: Any) -> UnknownKeyError:
    return UnknownKeyError(
        f"unknown key {'.'.join(keys)!r}{nearest(keys[-1], known)}",
        file=document.file,
        line=document.line(*keys),
        rule=f"known keys here: {', '.join(known)}" + (" (any NAME_path)" if keys[0] == SECTION else ""),
        remedy="correct or delete the key",
    )


def _syntax(document: Document, what: str, *keys: str) -> MapSyntaxError:
    return MapSyntaxError(
        what, file=document.file, line=document.line(*keys) if keys else None, rule=_RULES.get(keys[:1], _RULE)
    )
