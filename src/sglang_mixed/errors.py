"""Every error this package raises on purpose, as one tree.

MixedPrecisionError
├── MapError              the YAML map itself
│   ├── MapSyntaxError      not YAML, or not a mapping
│   ├── UnknownKeyError     a key we do not know
│   ├── UnknownSourceError  a weight is mapped to a source the map does not declare
│   └── PatternError        a pattern that is malformed or matches nothing
├── CheckpointError       one checkpoint folder
│   ├── MissingFileError    folder, shard, config or index is not there
│   ├── HeaderError         a safetensors header breaks a rule
│   ├── IndexFileError      the index contradicts the files
│   ├── TensorMissingError  a tensor that is needed is not in the checkpoint
│   ├── TruncatedFileError  a file ends before its tensors do
│   └── ChangedFileError    a file was written while it was in use
├── FormatError           how one module is stored
│   ├── UnknownFormatError       no registered format explains the tensors
│   ├── InconsistentFormatError  config and tensors contradict each other
│   └── InvalidValueError        NaN, an infinity, a scale that was never filled, a group that does not exist
├── PlanError             the sources do not make one model
│   ├── CoverageError       a parameter that no source holds
│   ├── ShapeError          a shape that differs from the base model's
│   ├── SmoothingError      a norm with smoothing folded in, apart from what reads it
│   ├── DifferentBaseError  sources that were made from different base models
│   ├── ParallelismError    a cut over ranks that a format cannot take
│   └── BudgetError         no mix of the sources is as small as asked
├── ExportError           a folder that an export cannot be written to
├── SensitivityError      measured errors that are none, or are of other sources
├── ExpertCountsError     counts of experts that are none, or are of another model
│   └── ExpertExportError   a file of counts that cannot be read or written
└── EngineError           inside a serving process
    ├── UnsupportedError    this engine, device or flag cannot do what the plan says
    ├── LedgerError         weights the model expects that never arrived, or the reverse
    └── ProofError          memory differs from the file it was read from
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class MixedPrecisionError(Exception):
    """Base of the tree: what is wrong, where (file, tensor, line), the rule it breaks and the remedy."""

    def __init__(
        self,
        what: str,
        *,
        file: str | Path | None = None,
        tensor: str | None = None,
        line: int | None = None,
        rule: str | None = None,
        remedy: str | None = None,
    ) -> None:
        self.what, self.tensor, self.line, self.rule, self.remedy = what, tensor, line, rule, remedy
        self.file = None if file is None else str(file)
        super().__init__(what)

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process borders (scheduler -> server); keyword-only arguments would be lost otherwise.
        return _rebuild, (type(self), self.what, self.file, self.tensor, self.line, self.rule, self.remedy)

    def __str__(self) -> str:
        where = self.file or ""
        if self.line is not None:
            where += f":{self.line}"
        parts = [f"{self.what}"]
        if where:
            parts.append(f"  file:   {where}")
        if self.tensor:
            parts.append(f"  tensor: {self.tensor}")
        if self.rule:
            parts.append(f"  rule:   {self.rule}")
        if self.remedy:
            parts.append(f"  remedy: {self.remedy}")
        return "\n".join(parts)


def _rebuild(
    kind: type[MixedPrecisionError],
    what: str,
    file: str | None,
    tensor: str | None,
    line: int | None,
    rule: str | None,
    remedy: str | None,
) -> MixedPrecisionError:
    return kind(what, file=file, tensor=tensor, line=line, rule=rule, remedy=remedy)


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name closest to `name` as ` (did you mean 'x'?)`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


class MapError(MixedPrecisionError):
    """The YAML map itself."""


class MapSyntaxError(MapError):
    """Not YAML, or not a mapping of the expected types."""


class UnknownKeyError(MapError):
    """A key we do not know."""


class UnknownSourceError(MapError):
    """A weight is mapped to a source that the map does not declare."""


class PatternError(MapError):
    """A pattern that is malformed or matches nothing."""


class CheckpointError(MixedPrecisionError):
    """One checkpoint folder."""


class MissingFileError(CheckpointError):
    """A folder, shard, config or index is not there."""


class HeaderError(CheckpointError):
    """A safetensors header breaks a rule of the format."""


class IndexFileError(CheckpointError):
    """The index contradicts the files."""


class TensorMissingError(CheckpointError):
    """A tensor that is needed is not in the checkpoint."""


class TruncatedFileError(CheckpointError):
    """A file ends before its tensors do."""


class ChangedFileError(CheckpointError):
    """A file was written between the check and the end of the load."""


class FormatError(MixedPrecisionError):
    """How one module is stored."""


class UnknownFormatError(FormatError):
    """No registered format explains a module's tensors."""


class InconsistentFormatError(FormatError):
    """A checkpoint's config and its tensors contradict each other."""


class InvalidValueError(FormatError):
    """A value that no weight may have: NaN, an infinity, a scale that was never filled, a group that is none."""


class PlanError(MixedPrecisionError):
    """The sources do not make one model."""


class CoverageError(PlanError):
    """A parameter of the model that no source holds."""


class ShapeError(PlanError):
    """A shape that differs from the base model's."""


class SmoothingError(PlanError):
    """A norm that smoothing was folded into, and what reads it, come from several sources."""


class DifferentBaseError(PlanError):
    """Sources that were made from different base models."""


class ParallelismError(PlanError):
    """A cut over ranks that a format cannot take."""


class BudgetError(PlanError):
    """No mix of the sources is as small as asked."""


class SensitivityError(MixedPrecisionError):
    """Measured errors that are none, or are of other sources."""


class ExportError(MixedPrecisionError):
    """A folder that an export cannot be written to."""


class ExpertCountsError(MixedPrecisionError):
    """Counts of experts that are none, or are of another model."""


class ExpertExportError(ExpertCountsError):
    """A file of counts that cannot be read or written."""


class EngineError(MixedPrecisionError):
    """Inside a serving process."""


class UnsupportedError(EngineError):
    """This engine, device or flag cannot do what the plan says."""


class LedgerError(EngineError):
    """Weights that the model expects and that never arrived, or the reverse."""


class ProofError(EngineError):
    """Memory differs from the file it was read from."""
