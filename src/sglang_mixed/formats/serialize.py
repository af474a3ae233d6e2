"""A ModuleFormat as plain JSON values, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ..errors import FormatError
from .base import ModuleFormat


def to_json(module_format: ModuleFormat) -> dict[str, Any]:
    """`{"name": ..., "shape": [out, in], "parameters": {...}}`, ready for `json.dumps`."""
    parameters = module_format.parameters
    values = {field.name: _lists(getattr(parameters, field.name)) for field in fields(parameters)}
    return {"name": module_format.name, "shape": list(module_format.shape), "parameters": values}


def from_json(value: Mapping[str, Any]) -> ModuleFormat:
    """The inverse of `to_json`. Raises FormatError for a value it did not write."""
    from . import get_format

    try:
        kind = get_format(value["name"]).parameters_type
        parameters = kind(**{name: _tuples(one) for name, one in value["parameters"].items()})
        return ModuleFormat(value["name"], parameters, _tuples(value["shape"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise FormatError(
            f"not a module's format: {value!r}",
            rule='{"name": ..., "shape": [out, in], "parameters": {...}}, as this version writes it',
            remedy="make the plan again",
        ) from error


def _lists(value: Any) -> Any:
    return [_lists(one) for one in value] if isinstance(value, tuple) else value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(one) for one in value) if isinstance(value, list) else value
