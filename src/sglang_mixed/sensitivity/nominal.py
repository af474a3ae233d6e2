"""What a format is expected to do to weights that nobody has looked at: its rounding of Gaussian values."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch

from ..formats import ModuleFormat
from ..formats.fp4 import VALUES
from ..plan.candidates import Candidates
from .table import Measure, Sensitivity

#: Standard normal values that are rounded; seeded, so that a plan is the same everywhere.
_SAMPLES = 1 << 16
_E4M3_LARGEST = 448.0
#: Columns that share a scale in the formats that say no group size: those of NVFP4 and MXFP4.
_GROUPS = {"nvfp4": 16, "mxfp4": 32}


def nominal_sensitivity(candidates: Candidates) -> Sensitivity:
    """Errors known from the headers alone: for any size of model in the time of a plan."""
    errors: dict[str, dict[str, float]] = {}
    for unit in candidates.units.values():
        for source, modules in unit.choices.items():
            if source != candidates.base:
                errors.setdefault(source, {}).update((one.name, nominal_error(one.format)) for one in modules)
    return Sensitivity(Measure.NOMINAL, candidates.base, errors, details={"weights": "Gaussian"})


@lru_cache(maxsize=4096)
def nominal_error(module_format: ModuleFormat) -> float:
    """||W' - W||^2 / ||W||^2 of standard normal values, each group rounded about its own largest; 0 for 16 bits."""
    if module_format.name == "plain":
        return 0.0
    parameters, columns = module_format.parameters, module_format.shape[-1]
    group = int(_GROUPS.get(module_format.name) or getattr(parameters, "group_size", None) or columns)
    size = min(group if group > 0 else columns, columns, _SAMPLES)
    return _simulated(_rounding(module_format), module_format.name, getattr(parameters, "bits", 8), size)


@lru_cache(maxsize=4096)
def _simulated(rounding: Callable[[torch.Tensor, int], torch.Tensor], _name: str, bits: int, size: int) -> float:
    values = torch.randn(_SAMPLES // size, size, generator=torch.Generator().manual_seed(0))
    error = rounding(values, bits) - values
    return float(error.square().sum() / values.square().sum())


def _rounding(module_format: ModuleFormat) -> Callable[[torch.Tensor, int], torch.Tensor]:
    return {"fp8": _to_e4m3, "nvfp4": _to_e2m1, "mxfp4": _to_e2m1_by_powers}.get(module_format.name, _to_integers)


def _to_integers(values: torch.Tensor, bits: int) -> torch.Tensor:
    half = 1 << bits - 1
    scale = _largest(values) / (half - 0.5)
    return (values / scale).round().clamp(-half, half - 1) * scale


def _to_e4m3(values: torch.Tensor, _bits: int) -> torch.Tensor:
    scale = _largest(values) / _E4M3_LARGEST
    rounded: torch.Tensor = (values / scale).to(torch.float8_e4m3fn).float() * scale
    return rounded


def _to_e2m1(values: torch.Tensor, _bits: int) -> torch.Tensor:
    return _nearest_e2m1(values, _largest(values) / max(VALUES))


def _to_e2m1_by_powers(values: torch.Tensor, _bits: int) -> torch.Tensor:
    # OCP Microscaling 1.0, section 6.3: the largest power of two in the group over that of the element type.
    return _nearest_e2m1(values, torch.exp2(_largest(values).log2().floor() - 2))


def _nearest_e2m1(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    codes = torch.tensor(sorted(set(VALUES)))
    middles = (codes[1:] + codes[:-1]) / 2
    return codes[torch.bucketize(values / scale, middles)] * scale


def _largest(values: torch.Tensor) -> torch.Tensor:
    return values.abs().amax(1, keepdim=True)
