"""What a checkpoint's `quantization_config` says of one module by its name.

Exceptions are written as GPTQModel's `dynamic` ("-:regex" not quantized, "+:regex" or "regex" other parameters),
AutoRound's `extra_config` (name or regex -> parameters), compressed-tensors' `ignore` and `config_groups.*.targets`
(a name, "re:regex", or a class such as "Linear"). All regexes match from the name's start; the first match wins.

Lists of what was left in 16 bits (`modules_to_not_convert`, `exclude_modules`, ModelOpt's `ignore`) have no rules here:
tools match them by substring, prefix or glob, each in its own way, and the tensors of such a module tell it anyway.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..errors import FormatError
from .regular import compile_regex

Config = Mapping[str, Any]
_MAPPINGS = frozenset(("dynamic", "extra_config", "config_groups", "quantized_layers"))
_TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys((*_MAPPINGS, "weights", "input_activations"), Mapping),
    **dict.fromkeys(("ignore", "targets", "weight_block_size"), list),
    **dict.fromkeys(("bits", "act_bits", "num_bits"), int),
    **dict.fromkeys(("quant_method", "activation_scheme", "strategy", "type", "quant_algo", "data_type"), str),
    **dict.fromkeys(("weight_scale_method", "weight_scale_semantics", "checkpoint_format", "packing_format"), str),
    **dict.fromkeys(("sym", "desc_act", "symmetric"), bool),
    "group_size": (int, list),
}
_FLOATING = re.compile(r"\.\*[^?+*{]")


class Rules:
    """Compiled once per checkpoint; `index` costs about a microsecond however many exact names there are."""

    def __init__(self, config: Config) -> None:
        self._whole = config
        _check_types(config)
        _refuse_rotation(config)
        rules = list(_rules(config))
        #: Per index the module's own config, None for "not quantized"; 0 is the rest's.
        self.configs: list[Config | None] = [_general(config), *(effective for _, _, effective in rules)]
        self._exact: dict[str, int] = {}
        self._patterns: list[tuple[int, re.Pattern[str]]] = []
        for index, (name, is_regex, _) in enumerate(rules, 1):
            if is_regex:
                self._patterns.append((index, compile_regex(name)))
            else:
                self._exact.setdefault(name, index)
        self._any = _union([pattern for _, pattern in self._patterns])

    def index(self, module: str) -> int:
        """Which of `configs` holds for this module."""
        exact = self._exact.get(module)
        if self._any is None or self._any.match(module):
            for index, pattern in self._patterns:
                if exact is not None and index > exact:
                    break
                if pattern.match(module):
                    return index
        return exact or 0

    def general(self, index: int) -> Config | None:
        """What holds for modules without rules of their own, where the module of this index is."""
        return self.configs[0]

    def origin(self, module: str) -> tuple[str, Config]:
        """The part of a mix that a module comes from (a checkpoint of one origin has one, ""), and all its config."""
        return "", self._whole


def _rules(config: Config) -> Iterator[tuple[str, bool, Config | None]]:
    """(name or regex, whether a regex, config or None), first match first."""
    dynamic = config.get("dynamic") or {}
    # GPTQModel puts the exclusions first whenever it reads a config.
    for key in sorted(dynamic, key=lambda key: not key.startswith("-:")):
        regex = key[2:] if key.startswith(("-:", "+:")) else key
        yield regex, True, None if key.startswith("-:") else {**config, **dynamic[key]}
    for key, extra in (config.get("extra_config") or {}).items():
        whole_precision = int(extra.get("bits") or 0) >= 16
        yield key, bool(re.search(r"[^\w.\-]", key)), None if whole_precision else {**config, **extra}
    if config.get("quant_method") == "compressed-tensors":
        for target in config.get("ignore") or ():
            yield *_target(target), None
        yield from sorted(_named_groups(config), key=lambda rule: rule[1])  # exact names before regexes


def _named_groups(config: Config) -> Iterator[tuple[str, bool, Config]]:
    for name, group in _groups(config).items():
        for target in group.get("targets") or ():
            if not _is_class(target):
                yield *_target(target), {**config, "config_groups": {name: group}}


def _general(config: Config) -> Config:
    """Modules that no target names belong to the groups that name a class, if there are any."""
    groups = _groups(config)
    general = {name: group for name, group in groups.items() if any(map(_is_class, group.get("targets") or ()))}
    return {**config, "config_groups": general} if general else config


def _groups(config: Config) -> dict[str, Any]:
    return dict(config.get("config_groups") or {})


def _is_class(target: str) -> bool:
    return target[:1].isupper()


def _target(target: str) -> tuple[str, bool]:
    return (target[3:], True) if target.startswith("re:") else (target, False)


def _check_types(config: Any) -> None:
    if not isinstance(config, Mapping):
        raise _malformed(f"{config!r} stands where a mapping belongs")
    for key, value in config.items():
        if value is None or key not in _TYPES:
            continue
        if not isinstance(value, _TYPES[key]):
            raise _malformed(f"{key} is {value!r}")
        for one in config[key].values() if key in _MAPPINGS else ():
            _check_types(one)


def _refuse_rotation(config: Config) -> None:
    """Rotated weights (QuIP, SpinQuant) are another basis's, and engines must rotate activations for them."""
    for key in ("transform_config", "rotation_config"):
        rotation = config.get(key)
        if rotation and not (isinstance(rotation, Mapping) and rotation.get("config_groups") == {}):
            raise FormatError(
                f"the weights are stored rotated: quantization_config has a {key}",
                rule="sources hold the base model's weights, quantized and nothing else",
                remedy="use a checkpoint that was quantized without transforms",
            )


def _malformed(what: str) -> FormatError:
    return FormatError(
        f"quantization_config is malformed: {what}",
        rule="bits and group_size are integers; dynamic, extra_config and config_groups map names to mappings",
        remedy="correct quantization_config in config.json",
    )


def _union(patterns: Iterable[re.Pattern[str]]) -> re.Pattern[str] | None:
    """One pattern that matches wherever any does, perhaps more; None where they cannot be joined (groups, flags)."""
    regexes = [pattern.pattern for pattern in patterns]
    if any("(" in regex for regex in regexes):
        return None
    # AutoRound writes one `.*layers.N...` per layer: behind one common `.*` they are matched together.
    floating = [regex[2:] for regex in regexes if _FLOATING.match(regex)]
    anchored = [regex for regex in regexes if not _FLOATING.match(regex)]
    parts = anchored + ([f".*(?:{'|'.join(floating)})"] if floating else [])
    return re.compile("|".join(parts) if parts else r"(?!)")
