"""The errors as one value and as a JSON file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from ..errors import SensitivityError
from ..experts.files import write_whole
from ..plan.candidates import Unit

_VERSION = 1


class Measure(StrEnum):
    """What an error is.

    NOMINAL: ||W' - W||^2 / ||W||^2 that a format brings to Gaussian weights. WEIGHT: the same of the true weights.
    DIVERGENCE: KL(p || p') of the next-token distributions in nats a token, where the unit alone is replaced.
    """

    NOMINAL = "nominal"
    WEIGHT = "weight"
    DIVERGENCE = "divergence"


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """`errors`: source -> unit or module -> error; the base brings none.

    `uses`: `...experts` -> for each expert, the share of the measured text's tokens that were routed to it; empty for
    a measure that saw no text. `details`: what was measured on, for the reader.
    """

    measure: Measure
    base: str
    errors: Mapping[str, Mapping[str, float]]
    uses: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)

    def error(self, unit: Unit, source: str) -> float:
        """The error of a unit, or the sum over its modules. Raises SensitivityError where it was not measured."""
        if source == self.base:
            return 0.0
        known = self.errors.get(source, {})
        if unit.name in known:
            return known[unit.name]
        try:
            return sum(known[name] for name in unit.modules)
        except KeyError as error:
            raise SensitivityError(
                f"no error was measured for {source}",
                tensor=str(error.args[0]),
                rule=f"known sources: {', '.join(self.errors)}; a unit was measured as a whole or by its modules",
                remedy="measure again with the same sources, and with --split where the plan is made with it",
            ) from None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "version": _VERSION,
            "measure": self.measure.value,
            "base": self.base,
            "errors": {source: dict(errors) for source, errors in self.errors.items()},
            "uses": {owner: list(shares) for owner, shares in self.uses.items()},
            "details": dict(self.details),
        }

    @classmethod
    def from_json(cls, value: Any) -> Sensitivity:
        """What `to_json` wrote. Raises SensitivityError for anything else."""
        try:
            if value["version"] != _VERSION:
                raise ValueError(f"version {value['version']}, known is {_VERSION}")
            errors = {str(source): _numbers(errors) for source, errors in value["errors"].items()}
            uses = {str(owner): tuple(map(_number, shares)) for owner, shares in value["uses"].items()}
            return cls(Measure(value["measure"]), str(value["base"]), errors, uses, dict(value["details"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SensitivityError(
                f"not a file of sensitivities: {error}", remedy="give a file that sglang-mixed sensitivity has written"
            ) from error


def read_sensitivity(path: str | Path) -> Sensitivity:
    """A file that `write_sensitivity` wrote. Raises SensitivityError."""
    try:
        return Sensitivity.from_json(json.loads(Path(path).read_bytes()))
    except OSError as error:
        raise SensitivityError(
            f"cannot be read: {error.strerror}", file=path, remedy="correct the path, or run sglang-mixed sensitivity"
        ) from error
    except (ValueError, RecursionError) as error:
        raise SensitivityError(
            f"not JSON: {error}", file=path, remedy="give a file that sglang-mixed sensitivity has written"
        ) from error
    except SensitivityError as error:
        error.file = str(path)
        raise


def write_sensitivity(path: str | Path, sensitivity: Sensitivity) -> None:
    """Write JSON, whole or not at all. Raises ExpertExportError, and leaves what was there, if it cannot."""
    write_whole(path, json.dumps(sensitivity.to_json(), indent=1).encode())


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {str(name): _number(value) for name, value in values.items()}


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{value!r} is no error")
    return float(value)
