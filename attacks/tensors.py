"""Tensors whose values cannot be a model's, or that are not all there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sglang_mixed.errors import CoverageError, FormatError, InconsistentFormatError, InvalidValueError, ShapeError

from .base import EXPERT, SINGLE, Attack, Q, Tensors, edit_index, edit_tensors, holding

NORM = "model.norm.weight"


def _in(source: str, change: Callable[[Tensors], object]) -> Any:
    return lambda folder: edit_tensors(folder / source / SINGLE, change)


def _fill(source: str, tensor: str, value: float, place: int | None = None) -> Any:
    """One value (or all) of a tensor of a source that is one file."""

    def change(tensors: Tensors) -> None:
        flat = tensors[tensor].view(-1)
        flat[slice(None) if place is None else place] = value

    return _in(source, change)


def _fill_shard(tensor: str, value: float, place: int | None = None) -> Any:
    def change(tensors: Tensors) -> None:
        flat = tensors[tensor].view(-1)
        flat[slice(None) if place is None else place] = value

    return lambda folder: edit_tensors(holding(folder, tensor), change)


def _code(value: int) -> Any:
    def change(tensors: Tensors) -> None:
        tensors[f"{Q}.weight"].view(torch.uint8)[3, 5] = value

    return _in("fp8", change)


def _without(tensor: str) -> Any:
    def build(folder: Path) -> None:
        edit_tensors(holding(folder, tensor), lambda tensors: tensors.pop(tensor))
        edit_index(folder, **{tensor: ...})

    return build


def _shape(folder: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors[f"{Q}.weight"] = tensors[f"{Q}.weight"].view(torch.uint8)[:32].view(torch.float8_e4m3fn)
        tensors[f"{Q}.weight_scale_inv"] = tensors[f"{Q}.weight_scale_inv"][:1]

    edit_tensors(folder / "fp8" / SINGLE, change)


def _dtype(folder: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors[f"{Q}.weight"] = tensors[f"{Q}.weight"].view(torch.int8)

    edit_tensors(folder / "fp8" / SINGLE, change)


NAN, INF, UNFILLED = float("nan"), float("inf"), float(torch.finfo(torch.float32).min)
SCALE = f"{Q}.weight_scale_inv"
_FINITE, _FILLED = "finite numbers", "other than zero"
ATTACKS = [
    Attack("a scale that is NaN", _fill("fp8", SCALE, NAN, 1), InvalidValueError, _FINITE, SINGLE, SCALE),
    Attack("a scale that is infinite", _fill("fp8", SCALE, INF, 1), InvalidValueError, _FINITE, SINGLE, SCALE),
    Attack("scales that are all zero", _fill("fp8", SCALE, 0), InvalidValueError, _FILLED, SINGLE, SCALE),
    Attack("a scale that an engine reserved and never filled", _fill("fp8", SCALE, UNFILLED, 2), InvalidValueError, _FILLED, SINGLE, SCALE),
    Attack("a GPTQ scale that is NaN", _fill_shard(f"{EXPERT}.scales", NAN, 3), InvalidValueError, _FINITE, tensor=f"{EXPERT}.scales"),
    Attack("an FP8 code that is NaN", _code(0x7F), InvalidValueError, _FINITE, SINGLE, f"{Q}.weight"),
    Attack("an FP8 code that is negative NaN", _code(0xFF), InvalidValueError, _FINITE, SINGLE, f"{Q}.weight"),
    Attack("a norm with an infinity", _fill("bf16", NORM, INF, 7), InvalidValueError, _FINITE, SINGLE, NORM),
    Attack("a head with a NaN (--verify-values)", _fill("bf16", "lm_head.weight", NAN, 77), InvalidValueError, _FINITE, SINGLE, "lm_head.weight"),
    Attack("a group that does not exist", _fill_shard(f"{EXPERT}.g_idx", 99, 5), InvalidValueError, "groups", tensor=f"{EXPERT}.g_idx"),
    Attack("a group below the first", _fill_shard(f"{EXPERT}.g_idx", -1, 5), InvalidValueError, "groups", tensor=f"{EXPERT}.g_idx"),
    Attack("zero points that sym denies", _fill_shard(f"{EXPERT}.qzeros", 0x11111111), InvalidValueError, "sym", tensor=f"{EXPERT}.qzeros"),
    Attack("zero points that are missing", _without(f"{EXPERT}.qzeros"), FormatError, "formats that are read"),
    Attack("scales that are missing", _without(f"{EXPERT}.scales"), FormatError, "formats that are read"),
    Attack("scales missing beside FP8", _in("fp8", lambda tensors: tensors.pop(SCALE)), FormatError, "scale", SINGLE),
    Attack("a module missing from its source", _in("fp8", lambda tensors: (tensors.pop(f"{Q}.weight"), tensors.pop(SCALE))), CoverageError, "chosen source holds", "fp8", Q),
    Attack("a tensor that belongs to no format", _in("fp8", lambda tensors: tensors.update({f"{Q}.extra": torch.ones(2)})), InconsistentFormatError, "consists of", SINGLE, f"{Q}.extra"),
    Attack("a weight of another shape", _shape, ShapeError, "base model's shapes", SINGLE, Q),
    Attack("FP8 that the header calls INT8", _dtype, InconsistentFormatError, "must say", SINGLE, f"{Q}.weight"),
    Attack("two scales of one weight", _in("fp8", lambda tensors: tensors.update({f"{Q}.weight_scale": torch.ones(64)})), InconsistentFormatError, "has one of", SINGLE, f"{Q}.weight"),
]  # fmt: skip
