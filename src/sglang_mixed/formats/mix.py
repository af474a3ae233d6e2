"""The `quantization_config` of an exported mix: each module is described by the config of the source it came from.

    {"quant_method": "mixed_precision", "version": 1, "sources": {
        "fp8": {"modules": ["model.layers.0.mlp.experts.{0..3}.up_proj", ...], "quantization_config": {...}}, ...}}

`modules` are names or patterns as in a map, every module in one source's list; a source that is not quantized has an
empty config. A config may say one thing more than its tool's: `zero_offset`, where that leaves open how zero points
are stored. Where other tools can read the mix, all this stands in config.json under the key `mixed_precision`, and
`quantization_config` is as they know it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import FormatError, PatternError
from ..patterns import NameTree, parse_pattern
from .rules import Config, Rules

METHOD = "mixed_precision"
#: Of config.json, where `quantization_config` is other tools'.
KEY = "mixed_precision"
VERSION = 1


def mix_config(sources: Mapping[str, tuple[Iterable[str], Config]]) -> dict[str, Any]:
    """The config of a mix: source name -> (patterns of its modules, its own quantization config)."""
    described = {
        name: {"modules": list(patterns), "quantization_config": dict(config)}
        for name, (patterns, config) in sources.items()
    }
    return {"quant_method": METHOD, "version": VERSION, "sources": described}


class MixRules:
    """As `Rules`, of several sources. Raises FormatError unless every one of `modules` is in exactly one of them."""

    def __init__(self, config: Config, modules: Iterable[str]) -> None:
        self._sources = _sources(config)
        names = list(modules)
        tree = NameTree(names, lambda _: ("weight",))
        #: Per index the module's own config, None for "not quantized".
        self.configs: list[Config | None] = []
        self._general: list[Config | None] = []
        self._places: dict[str, tuple[str, int]] = {}
        for source, described in self._sources.items():
            rules, first = Rules(described["quantization_config"]), len(self.configs)
            self.configs += rules.configs
            self._general += [rules.configs[0]] * len(rules.configs)
            for module in _matched(tree, source, described["modules"]):
                if module in self._places:
                    raise _malformed(f"{module} is in the lists of {self._places[module][0]} and {source}")
                self._places[module] = source, first + rules.index(module)
        if lacking := [name for name in names if name not in self._places]:
            raise _malformed(f"{lacking[0]} is in no source's list (and {len(lacking) - 1} more)")

    def index(self, module: str) -> int:
        """Which of `configs` holds for this module."""
        return self._places[module][1]

    def general(self, index: int) -> Config | None:
        """What holds for modules without rules of their own, where the module of this index is."""
        return self._general[index]

    def origin(self, module: str) -> tuple[str, Config]:
        """The source that a module came from, and all its config."""
        source = self._places[module][0]
        return source, self._sources[source]["quantization_config"]


def _sources(config: Config) -> dict[str, Any]:
    if config.get("version") != VERSION:
        raise _malformed(f"version {config.get('version')!r}, and this program reads {VERSION}")
    sources = config.get("sources")
    if not isinstance(sources, dict) or not sources:
        raise _malformed("it names no sources")
    for name, described in sources.items():
        is_whole = isinstance(described, dict) and isinstance(described.get("quantization_config"), dict)
        if not is_whole or not isinstance(described.get("modules"), list):
            raise _malformed(f"the source {name!r} lacks its modules or its quantization_config")
        if described["quantization_config"].get("quant_method") == METHOD:
            raise _malformed(f"the source {name!r} is a mix itself")
    return sources


def _matched(tree: NameTree, source: str, patterns: list[Any]) -> Iterable[str]:
    for pattern in patterns:
        try:
            matched = tree.match(parse_pattern(str(pattern)))
        except PatternError as error:
            raise _malformed(f"{source}: {error.what}") from error
        if not matched:
            raise _malformed(f"{pattern!r} of {source} names no module of the checkpoint")
        yield from matched


def _malformed(what: str) -> FormatError:
    return FormatError(
        f"quantization_config of a mix is malformed: {what}",
        rule="every module of the checkpoint is named by one pattern of one of the sources",
        remedy="export the mix again",
    )
