"""Safe YAML with line numbers: plain values only, no duplicate keys, no aliases, bounded size and depth."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .errors import MapSyntaxError, MissingFileError

MAX_BYTES = 16 << 20
MAX_DEPTH = 16
_PLAIN = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null"))
_Loader: type = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed file: `value` is its top mapping, `lines` the line of every key by its path of keys."""

    file: Path
    value: dict[str, Any]
    lines: dict[tuple[str, ...], int]

    def line(self, *keys: str) -> int:
        """The line of a key, or of its nearest ancestor that has one."""
        while keys and keys not in self.lines:
            keys = keys[:-1]
        return self.lines.get(keys, 1)


def read_yaml(file: Path) -> Document:
    """The top-level mapping of a YAML file, every key a string."""
    text = _read_text(file)
    try:
        _check_events(file, text)
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = f"not YAML: {getattr(error, 'problem', None) or str(error).splitlines()[0]}"
        rule = "a map is one document of YAML"
        raise MapSyntaxError(what, file=file, line=mark.line + 1 if mark else None, rule=rule) from None
    lines: dict[tuple[str, ...], int] = {}
    if not isinstance(node, yaml.MappingNode):
        raise MapSyntaxError("the file is not a mapping", file=file, rule="the top level is a mapping of sections")
    value = _Converter(file, lines).convert(node, ())
    return Document(file, value, lines)


def _read_text(file: Path) -> str:
    if not file.is_file():
        raise MissingFileError("the map is not a file", file=file, remedy="give the path of a YAML map")
    if file.stat().st_size > MAX_BYTES:
        raise MapSyntaxError("the map is too large", file=file, rule=f"at most {MAX_BYTES >> 20} MiB")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise MapSyntaxError(f"not text: {error.reason}", file=file, rule="a map is text in UTF-8") from None


def _check_events(file: Path, text: str) -> None:
    """Refuse depth and aliases before anything recursive runs: composing either could exhaust stack or memory."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        line = _line(event)
        if isinstance(event, yaml.AliasEvent):
            raise MapSyntaxError("an alias (*name)", file=file, line=line, rule="a map has no anchors and aliases")
        if depth > MAX_DEPTH:
            raise MapSyntaxError("nested too deeply", file=file, line=line, rule=f"at most {MAX_DEPTH} levels")


class _Converter:
    """Nodes to plain values, collecting the line of each key."""

    def __init__(self, file: Path, lines: dict[tuple[str, ...], int]) -> None:
        self._file, self._lines = file, lines
        self._scalars = yaml.SafeLoader("")

    def convert(self, node: yaml.Node, path: tuple[str, ...]) -> Any:
        if node.tag not in _PLAIN:
            raise MapSyntaxError(f"the tag {node.tag}", file=self._file, line=_line(node), rule="values are plain")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.convert(item, path) for item in node.value]
        try:
            return self._scalars.construct_object(node)
        except (yaml.YAMLError, ValueError) as error:
            what = f"not a plain value: {error}"
            raise MapSyntaxError(what, file=self._file, line=_line(node), rule="values are plain") from None

    def _mapping(self, node: yaml.MappingNode, path: tuple[str, ...]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line, key = _line(key_node), self.convert(key_node, path)
            if not isinstance(key, str):
                raise MapSyntaxError(
                    f"the key {key!r} is not text",
                    file=self._file,
                    line=line,
                    rule="keys are text: YAML takes yes, no, on, off and numbers for something else",
                    remedy="put it in quotes",
                )
            if key in values:
                first = self._lines[(*path, key)]
                raise MapSyntaxError(
                    f"the key {key!r} stands twice",
                    file=self._file,
                    line=line,
                    rule="a key stands once in its mapping",
                    remedy=f"delete this line or line {first}",
                )
            self._lines[(*path, key)] = line
            values[key] = self.convert(value_node, (*path, key))
        return values


def _line(marked: yaml.Node | yaml.Event) -> int:
    return marked.start_mark.line + 1 if marked.start_mark else 1
