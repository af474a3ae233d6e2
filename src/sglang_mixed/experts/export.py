"""An export: the three fields that the first users know, and under one more key all that we know besides."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ..errors import ExpertCountsError
from .counts import LARGEST, Counts, ExpertCounts
from .formats import ExpertFormats
from .statistics import ExpertActivity, activities, expert_stats, layer_stats, top_experts

#: The key under which our additions stand.
EXTRA = "sglang_mixed"
TOP = 10


class RequestLengths(BaseModel):
    """One request, in tokens, and the activations that were recorded with its id."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    input_length: int = Field(default=0, ge=0)
    output_length: int = Field(default=0, ge=0)
    activations: int = Field(default=0, ge=0)


class _Entry(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)
    layer_id: int = Field(ge=0, lt=2**16)
    expert_id: int = Field(ge=0, lt=2**16)
    activation_count: int = Field(ge=0, le=LARGEST)
    last_activation_time: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    total_tokens_processed: int = Field(ge=0, le=LARGEST)


_ENTRIES = TypeAdapter(dict[str, _Entry])
_REQUESTS = TypeAdapter(dict[str, RequestLengths])


@dataclass(frozen=True, slots=True)
class ExpertExport:
    """What the experts did. `counts`: prefill and decode apart, None where only the three fields are known.

    `formats` go with `counts`.
    """

    experts: tuple[ExpertActivity, ...]
    since: float | None = None
    until: float | None = None
    counts: ExpertCounts | None = None
    formats: ExpertFormats | None = None
    requests: Mapping[str, RequestLengths] = field(default_factory=dict)

    @classmethod
    def of_counts(cls, counts: ExpertCounts, formats: ExpertFormats | None = None) -> ExpertExport:
        """What a server exports."""
        return cls(activities(counts), counts.since, counts.until, counts, formats)

    def grid(self) -> tuple[tuple[int, ...], Counts]:
        """(layers, activations as int64 [layers, experts]); experts that are not mentioned did nothing."""
        if self.counts is not None:
            return self.counts.layers, self.counts.total
        layers = tuple(sorted({one.layer_id for one in self.experts}))
        rows = {layer: row for row, layer in enumerate(layers)}
        grid = np.zeros((len(layers), 1 + max((one.expert_id for one in self.experts), default=-1)), np.int64)
        for one in self.experts:
            grid[rows[one.layer_id], one.expert_id] = one.activation_count
        return layers, grid

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values but for the layers and experts of `layer_stats`, which are numbers as in Python's API."""
        extra = {
            "since": self.since,
            "until": self.until,
            **(self.counts.to_json() if self.counts else {}),
            "formats": self.formats.to_json() if self.formats else None,
            "requests": {name: request.model_dump() for name, request in self.requests.items()},
        }
        return {
            "expert_stats": expert_stats(self.experts),
            "layer_stats": layer_stats(self.experts),
            "top_experts": top_experts(self.experts, TOP),
            EXTRA: extra,
        }

    @classmethod
    def from_json(cls, value: Any) -> ExpertExport:
        """What `to_json` wrote, here or in an older program that knew the three fields only.

        Raises ExpertCountsError for anything else.
        """
        if not isinstance(value, Mapping) or "expert_stats" not in value:
            raise ExpertCountsError(
                "not an export of expert statistics", rule="a JSON object with expert_stats, layer_stats, top_experts"
            )
        experts = _experts(value["expert_stats"])
        extra = value.get(EXTRA) or {}
        if not isinstance(extra, Mapping):
            raise ExpertCountsError(f"{EXTRA!r} is no object", rule="our additions stand in one object")
        counts = ExpertCounts.from_json(extra) if "prefill" in extra else None
        if counts is not None and activities(counts) != tuple(sorted(experts)):
            raise ExpertCountsError(
                f"expert_stats and {EXTRA} contradict each other",
                rule="both hold the same counts",
                remedy="export again; a file that was edited by hand keeps only expert_stats",
            )
        formats = ExpertFormats.from_json(extra["formats"]) if counts and extra.get("formats") else None
        if formats and counts and formats.cells.shape != counts.prefill.shape:
            raise ExpertCountsError("formats of other experts than those counted", rule="one format per expert")
        return cls(experts, _time(extra, "since"), _time(extra, "until"), counts, formats, _requests(extra))


def merge(exports: Iterable[ExpertExport]) -> ExpertExport:
    """The sum of several exports of one model; at least one. Raises ExpertCountsError for different models.

    What not all of them know is left out: prefill and decode apart, or formats that were not the same.
    """
    return reduce(_merge, exports)


def _merge(one: ExpertExport, other: ExpertExport) -> ExpertExport:
    counts = one.counts + other.counts if one.counts is not None and other.counts is not None else None
    since = [time for time in (one.since, other.since) if time is not None]
    until = [time for time in (one.until, other.until) if time is not None]
    return ExpertExport(
        activities(counts) if counts else _sum(one.experts, other.experts),
        min(since, default=None),
        max(until, default=None),
        counts,
        one.formats if _same(one.formats, other.formats) else None,
        {**one.requests, **other.requests},
    )


def _sum(one: Iterable[ExpertActivity], other: Iterable[ExpertActivity]) -> tuple[ExpertActivity, ...]:
    merged = {(entry.layer_id, entry.expert_id): entry for entry in one}
    for entry in other:
        known = merged.get(entry[:2], ExpertActivity(*entry[:2], 0, 0.0, 0))
        merged[entry[:2]] = ExpertActivity(
            *entry[:2],
            known.activation_count + entry.activation_count,
            max(known.last_activation_time, entry.last_activation_time),
            known.total_tokens_processed + entry.total_tokens_processed,
        )
    return tuple(merged[key] for key in sorted(merged))


def _same(one: ExpertFormats | None, other: ExpertFormats | None) -> bool:
    return one is not None and other is not None and one.to_json() == other.to_json()


def _experts(value: Any) -> tuple[ExpertActivity, ...]:
    try:
        entries = _ENTRIES.validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        raise ExpertCountsError(
            f"expert_stats: {'.'.join(map(str, first['loc']))}: {first['msg']}",
            rule="layer_id, expert_id, activation_count, last_activation_time, total_tokens_processed per expert",
        ) from error
    for name, entry in entries.items():
        if name != f"layer_{entry.layer_id}_expert_{entry.expert_id}":
            raise ExpertCountsError(f"{name!r} holds layer {entry.layer_id}, expert {entry.expert_id}")
    return tuple(ExpertActivity(**entry.model_dump()) for entry in entries.values())


def _requests(extra: Mapping[str, Any]) -> dict[str, RequestLengths]:
    try:
        return _REQUESTS.validate_python(extra.get("requests") or {})
    except ValidationError as error:
        raise ExpertCountsError(f"requests: {error.errors()[0]['msg']}") from error


def _time(extra: Mapping[str, Any], key: str) -> float | None:
    value = extra.get(key)
    if value is not None and not isinstance(value, int | float):
        raise ExpertCountsError(f"{key} is no time: {value!r}", rule="unix seconds")
    return value
