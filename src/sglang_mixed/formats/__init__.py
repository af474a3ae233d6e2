"""How weights are stored: the formats by name, and what is common to them."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from typing import Any

from ..errors import FormatError, UnknownFormatError, nearest
from .base import ModuleFormat, TensorInfo, TensorSpec, WeightFormat, tensor_bytes
from .detector import Detector
from .serialize import from_json, to_json

__all__ = [
    "Detector",
    "ModuleFormat",
    "TensorInfo",
    "detect",
    "from_json",
    "get_format",
    "label_of",
    "nbytes",
    "tensor_specs",
    "to_json",
]

#: name -> module:class, in the order they are tried; plain takes what the others leave.
FORMATS: dict[str, str] = {}


def register(name: str, where: str) -> None:
    """Add a format after the others; a name is given once."""
    if name in FORMATS:
        raise FormatError(f"format {name!r} is registered twice", rule=f"it is {FORMATS[name]}, then {where}")
    FORMATS[name] = where


for _name, _kind in (
    ("gptq", "GPTQ"),
    ("awq", "AWQ"),
    ("packed", "Packed"),
    ("fp8", "FP8"),
    ("int8", "Int8"),
    ("nvfp4", "NVFP4"),
    ("mxfp4", "MXFP4"),
    ("plain", "Plain"),
):
    register(_name, f"{__name__}.{_name}:{_kind}")


@functools.cache
def get_format(name: str) -> WeightFormat:
    """The format of this name, imported on first use."""
    if name not in FORMATS:
        raise UnknownFormatError(f"no format {name!r}{nearest(name, FORMATS)}", rule=f"one of {', '.join(FORMATS)}")
    module, _, kind = FORMATS[name].partition(":")
    return getattr(importlib.import_module(module), kind)()  # type: ignore[no-any-return]


def label_of(module_format: ModuleFormat) -> str:
    """A format's short human name, such as `GPTQ int4 g128`."""
    return get_format(module_format.name).label(module_format.parameters)


def detect(module: str, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any] | None) -> ModuleFormat:
    """The format of one module; for many of one checkpoint use a `Detector`."""
    return Detector(config, (module,))(module, tensors)


@functools.lru_cache(maxsize=65536)
def tensor_specs(module_format: ModuleFormat) -> Mapping[str, TensorSpec]:
    """Local name -> what it must be, of a module of this format."""
    return get_format(module_format.name).tensors(module_format.parameters, module_format.shape)


@functools.lru_cache(maxsize=65536)
def nbytes(module_format: ModuleFormat) -> int:
    """Exact bytes of the module's tensors as stored, `bias` left out (unless it is all there is)."""
    specs = tensor_specs(module_format)
    counted = [spec for name, spec in specs.items() if name != "bias" or len(specs) == 1]
    return sum(tensor_bytes(TensorInfo(spec.dtypes[0], spec.shape)) for spec in counted)
