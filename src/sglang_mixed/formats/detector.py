"""Detection of a whole checkpoint's modules, each kind of module examined once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import InconsistentFormatError, UnknownFormatError
from .base import ModuleFormat, TensorInfo, weight_tensors
from .mix import METHOD, MixRules
from .recognise import recognise
from .rules import Rules


class Detector:
    """Tells the formats of one checkpoint's modules; modules alike in tensors and config share one ModuleFormat.

    `config` is the checkpoint's `quantization_config`; that of an exported mix names its parts' `modules` by patterns.
    """

    def __init__(self, config: Mapping[str, Any] | None, modules: Iterable[str] = ()) -> None:
        config = config or {}
        self.rules = MixRules(config, modules) if config.get("quant_method") == METHOD else Rules(config)
        self._found: dict[tuple[int, tuple[tuple[str, TensorInfo], ...]], ModuleFormat] = {}

    def __call__(self, module: str, tensors: Mapping[str, TensorInfo]) -> ModuleFormat:
        """The format of a module from its local tensors. Raises UnknownFormatError, InconsistentFormatError."""
        rule = self.rules.index(module)
        key = rule, tuple(tensors.items())
        found = self._found.get(key)
        if found is None:
            found = self._found[key] = _detect(
                module, weight_tensors(tensors), self.rules.configs[rule], self.rules.general(rule)
            )
        return found


def _detect(
    module: str, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any] | None, general: Mapping[str, Any] | None
) -> ModuleFormat:
    from . import FORMATS, get_format

    effective = (general if config is None else config) or {}
    found = None
    for name in FORMATS:
        if found := get_format(name).detect(module, tensors, effective):
            break
    if found is None:
        raise _unknown(module, tensors, recognise(tensors, effective))
    if config is None and found.name != "plain":
        raise InconsistentFormatError(
            f"config.json says this module is not quantized; its tensors are {found.name}",
            tensor=module,
            rule="modules named in ignore, or excluded in dynamic, are stored as they are",
            remedy="correct quantization_config in config.json, or map this module to another source",
        )
    return found


def _unknown(module: str, tensors: Mapping[str, TensorInfo], seen: str | None) -> UnknownFormatError:
    from . import FORMATS

    listing = ", ".join(f"{name} {info.dtype} {list(info.shape)}" for name, info in tensors.items())
    what = f"{seen} is recognised but not read" if seen else "no format explains these tensors"
    return UnknownFormatError(
        f"{what}: {listing or 'none'}",
        tensor=module,
        rule=f"formats that are read: {', '.join(FORMATS)}",
        remedy="map this module to a source in one of them",
    )
