"""Every module of the base, found in the source that the map chose: there, readable, and of the base's shape."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple, NoReturn

from ..checkpoint import Checkpoint
from ..errors import CoverageError, FormatError, ShapeError
from ..formats import ModuleFormat, TensorInfo
from ..formats.base import CACHE_SCALES, weight_tensors
from ..formats.gptq import zero_offset_from
from .families import expert_of
from .fold import fold
from .plan import PlannedModule
from .resolve import Assignment


class Verdict(NamedTuple):
    """What holds for every module whose tensors are these, in the source and in the base."""

    format: ModuleFormat
    tensors: tuple[str, ...]
    bias: str | None
    has_needless_bias: bool
    has_cache_scales: bool


def cover(
    reference: str, checkpoints: Mapping[str, Checkpoint], assignment: Assignment
) -> tuple[dict[str, PlannedModule], list[str]]:
    """The planned modules in the base's order, and warnings. Raises CoverageError, ShapeError, FormatError."""
    base = checkpoints[reference]
    planned: dict[str, PlannedModule] = {}
    missing: list[str] = []
    needless: list[str] = []
    verdicts: dict[tuple[str, int, int, int | None, int | None], Verdict] = {}
    kinds = {source: checkpoint.modules.kinds for source, checkpoint in checkpoints.items()}
    rules = {source: checkpoint.rule for source, checkpoint in checkpoints.items()}
    base_kinds, base_rule = kinds[reference], rules[reference]
    cached = {kind for kind, tensors in enumerate(base.modules.tensors_of_kinds) if tensors.keys() <= CACHE_SCALES}
    cache_scales: list[str] = []
    new = tuple.__new__
    for module, rule in assignment.rules.items():
        base_kind = base_kinds[module]
        if base_kind in cached:
            cache_scales.append(module)
            continue
        source = assignment.default if rule is None else rule.source
        kind = kinds[source].get(module)
        if kind is None:
            missing.append(module)
            continue
        # What is true of one module is true of all with equal tensors and an equal place in both configs.
        key = source, kind, base_kind, rules[source](module), base_rule(module)
        verdict = verdicts.get(key)
        if verdict is None:
            verdict = verdicts[key] = _judge(module, source, reference, checkpoints, assignment)
        if verdict.has_needless_bias:
            _require_zero_bias(module, checkpoints[source])
            needless.append(module)
        if verdict.has_cache_scales:
            cache_scales.append(module)
        # Half the cost of the constructor, which is written in Python.
        planned[module] = new(PlannedModule, (module, source, verdict.format, verdict.tensors, verdict.bias))
    if missing:
        _refuse_missing(missing, checkpoints, assignment)
    return planned, [*_warn_needless(needless), *_warn_cache_scales(cache_scales)]


def _judge(
    module: str, source: str, reference: str, checkpoints: Mapping[str, Checkpoint], assignment: Assignment
) -> Verdict:
    checkpoint, base = checkpoints[source], checkpoints[reference]
    found, expected = _format(checkpoint, module), _format(base, module)
    tensors, base_tensors = weight_tensors(checkpoint.modules[module]), weight_tensors(base.modules[module])
    has_cache_scales = len(tensors) < len(checkpoint.modules[module])
    needless = "bias" in tensors and "bias" not in base_tensors
    if needless:
        tensors = {local: info for local, info in tensors.items() if local != "bias"}
        found = _format(checkpoint, module, tensors)
    if found.shape != expected.shape:
        _refuse_shape(module, found, expected, checkpoint, source, reference)
    _check_parts(module, base_tensors, expected, tensors, checkpoint, assignment)
    bias = tensors.get("bias") if len(tensors) > 1 else None
    found = _with_zero_offset(module, found, checkpoint, checkpoints.values())
    return Verdict(found, tuple(tensors), bias.dtype if bias else None, needless, has_cache_scales)


def _with_zero_offset(
    module: str, found: ModuleFormat, checkpoint: Checkpoint, others: Iterable[Checkpoint]
) -> ModuleFormat:
    """Where the config is no proof of how zero points are stored, the tensors and a 16-bit source are."""
    if getattr(found.parameters, "zero_offset_known", True):
        return found
    originals = (other for other in others if module in other.modules and other.format(module).name == "plain")
    original = None if found.parameters.symmetric else next(originals, None)
    reference = original.dequantize(module) if original else None
    try:
        offset = zero_offset_from(reference, checkpoint.read(module), found.parameters)
    except FormatError as error:
        error.file, error.tensor = str(checkpoint.file_of(module)), f"{module}.{error.tensor}"
        raise
    return replace(found, parameters=replace(found.parameters, zero_offset=offset, zero_offset_known=True))


def _format(checkpoint: Checkpoint, module: str, tensors: Mapping[str, TensorInfo] | None = None) -> ModuleFormat:
    try:
        return checkpoint.format(module, tensors)
    except FormatError as error:
        if error.file is not None:
            raise
        raise type(error)(
            error.what,
            file=checkpoint.file_of(module),
            tensor=error.tensor or module,
            rule=error.rule,
            remedy=error.remedy,
        ) from error


def _check_parts(
    module: str,
    expected: Iterable[str],
    base_format: ModuleFormat,
    tensors: Mapping[str, TensorInfo],
    checkpoint: Checkpoint,
    assignment: Assignment,
) -> None:
    """A bias, or another tensor beside a plain weight, must come with the module."""
    parts = [name for name in expected if name == "bias" or (base_format.name == "plain" and name != "weight")]
    lacking = [name for name in parts if name not in tensors]
    if lacking:
        raise CoverageError(
            f"the chosen source holds this module without its {', '.join(lacking)}",
            file=checkpoint.path,
            tensor=f"{module}.{lacking[0]}",
            rule="all tensors of one module come from one source",
            remedy=f"map the module to another source (it was {assignment.reason(module)})",
        )


def _refuse_shape(
    module: str, found: ModuleFormat, expected: ModuleFormat, checkpoint: Checkpoint, source: str, reference: str
) -> NoReturn:
    raise ShapeError(
        f"{source} holds a weight of {list(found.shape)}, the base {reference} one of {list(expected.shape)}",
        file=checkpoint.file_of(module),
        tensor=module,
        rule="every source has the base model's shapes",
        remedy=f"check that {source} was made from the same model as {reference}",
    )


def _refuse_missing(missing: list[str], checkpoints: Mapping[str, Checkpoint], assignment: Assignment) -> NoReturn:
    first = missing[0]
    source = assignment.source(first)
    checkpoints[source].check_index()
    others = [name for name, checkpoint in checkpoints.items() if first in checkpoint.modules]
    same = fold(name for name in missing if assignment.source(name) == source)
    lines = "".join(f'\n    "{pattern}": {others[0]}' for pattern in same[:8]) if others else ""
    raise CoverageError(
        f"the source {source} does not hold {len(missing)} of the modules it should give"
        + _fused_instead(first, checkpoints[source]),
        file=checkpoints[source].path,
        tensor=first,
        rule=f"the chosen source holds the module (chosen by {assignment.reason(first)})",
        remedy=f"add to weight_mapping:{lines}" if lines else f"complete the checkpoint {source}",
    )


def _fused_instead(module: str, checkpoint: Checkpoint) -> str:
    """Where the source has a layer's experts in tensors that could not be taken apart, these."""
    expert = expert_of(module.rpartition(".")[0])
    fused = checkpoint.modules.get(expert[0]) if expert else None
    return f" ({', '.join(sorted(fused))} of all experts of a layer are in a layout that is not read)" if fused else ""


def _require_zero_bias(module: str, checkpoint: Checkpoint) -> None:
    """Old GPTQ exports write a bias of zeros everywhere; any other one belongs to another model."""
    if checkpoint.read_tensor(f"{module}.bias").count_nonzero():
        raise ShapeError(
            "the source has a bias here, and the base model has none",
            file=checkpoint.file_of(module),
            tensor=f"{module}.bias",
            rule="a bias that the base does not have may only be zeros",
            remedy="check that the source was made from the base, or map this module to another source",
        )


def _warn_needless(modules: list[str]) -> list[str]:
    if not modules:
        return []
    patterns = ", ".join(fold(modules)[:4])
    return [f"{len(modules)} modules have a bias of zeros that the base model does not: it is not loaded ({patterns})"]


def _warn_cache_scales(modules: list[str]) -> list[str]:
    if not modules:
        return []
    patterns = ", ".join(fold(modules)[:4])
    return [f"scales of a quantized key-value cache stand beside {len(modules)} modules: not loaded ({patterns})"]
