"""Experts' errors count by how much they are used."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_mixed.config import MixedPrecisionMap
from sglang_mixed.errors import ExpertCountsError, SensitivityError
from sglang_mixed.experts import ExpertCounts, ExpertExport
from sglang_mixed.plan.candidates import Candidates, find_candidates
from sglang_mixed.search import weighted_errors
from sglang_mixed.sensitivity import Measure, Sensitivity

from ..models import write

OWNERS = ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")


@pytest.fixture
def candidates(tmp_path: Path) -> Candidates:
    sources = {kind: write(tmp_path / kind, kind) for kind in ("bf16", "fp8")}
    return find_candidates(MixedPrecisionMap(tmp_path / "sources", sources))


def counted(*rows: tuple[int, ...]) -> ExpertExport:
    counts = ExpertCounts.zeros(tuple(range(len(rows))), len(rows[0]), 2, 0.0)
    counts.decode[:] = rows
    return ExpertExport.of_counts(counts)


def flat(candidates: Candidates, measure: Measure, **details: int) -> Sensitivity:
    errors = {"fp8": dict.fromkeys(candidates.units, 1.0)}
    return Sensitivity(measure, "bf16", errors, dict.fromkeys(OWNERS, (0.5,) * 4), details)


def test_errors_of_weights_count_by_the_tokens_that_meet_them(candidates: Candidates) -> None:
    errors = weighted_errors(candidates, flat(candidates, Measure.WEIGHT))
    assert errors[f"{OWNERS[0]}.1", "fp8"] == 0.5  # top-2 of 4
    assert errors["model.layers.0.self_attn.o_proj", "fp8"] == 1.0
    assert errors[f"{OWNERS[0]}.1", "bf16"] == 0.0
    busy = weighted_errors(candidates, flat(candidates, Measure.WEIGHT), counted((600, 200, 196, 0), (1, 1, 1, 1)))
    assert busy[f"{OWNERS[0]}.0", "fp8"] == pytest.approx(2 * 601 / 1000)
    assert busy[f"{OWNERS[0]}.3", "fp8"] == pytest.approx(2 * 1 / 1000)
    assert busy["model.layers.0.self_attn.o_proj", "fp8"] == 1.0


def test_a_divergence_is_moved_to_the_traffic(candidates: Candidates) -> None:
    measured = flat(candidates, Measure.DIVERGENCE, tokens=4096)
    assert weighted_errors(candidates, measured)[f"{OWNERS[0]}.3", "fp8"] == 1.0
    as_measured = weighted_errors(candidates, measured, counted((999, 999, 999, 999), (999, 999, 999, 999)))
    assert as_measured[f"{OWNERS[0]}.3", "fp8"] == pytest.approx(1.0)
    skewed = weighted_errors(candidates, measured, counted((2996, 1000, 0, 0), (1, 1, 1, 1)))
    assert skewed[f"{OWNERS[0]}.0", "fp8"] == pytest.approx(2997 / 1000)
    assert skewed[f"{OWNERS[0]}.3", "fp8"] == pytest.approx(1 / 1000)


def test_an_expert_that_the_text_never_met_is_not_free_of_error(candidates: Candidates) -> None:
    errors = {"fp8": dict.fromkeys(candidates.units, 1.0) | {f"{OWNERS[0]}.3": 0.0}}
    uses = {OWNERS[0]: (0.5, 0.5, 1.0, 0.0), OWNERS[1]: (0.5,) * 4}
    measured = Sensitivity(Measure.DIVERGENCE, "bf16", errors, uses, {"tokens": 4096})
    found = weighted_errors(candidates, measured, counted((1, 1, 1, 997), (1, 1, 1, 1)))
    assert found[f"{OWNERS[0]}.3", "fp8"] > 1.0


def test_counts_of_another_model_are_refused(candidates: Candidates) -> None:
    for traffic in (counted((1, 1, 1, 1)), counted((1,) * 5, (1,) * 5)):
        with pytest.raises(ExpertCountsError, match="experts"):
            weighted_errors(candidates, flat(candidates, Measure.WEIGHT), traffic)


def test_what_was_not_measured_is_named(candidates: Candidates) -> None:
    measured = Sensitivity(Measure.WEIGHT, "bf16", {"fp8": {"model.layers.0.self_attn.o_proj": 1.0}})
    with pytest.raises(SensitivityError, match="no error was measured for fp8"):
        weighted_errors(candidates, measured)


def test_a_measurement_that_counted_no_experts_cannot_be_moved_to_traffic(candidates: Candidates) -> None:
    errors = {"fp8": dict.fromkeys(candidates.units, 1.0)}
    measured = Sensitivity(Measure.DIVERGENCE, "bf16", errors, {}, {"tokens": 4096})
    with pytest.raises(SensitivityError, match="did not count"):
        weighted_errors(candidates, measured, counted((1, 1, 1, 1), (1, 1, 1, 1)))
