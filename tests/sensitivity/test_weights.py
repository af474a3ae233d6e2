"""Errors of weights, expected and measured, and a measurement that goes on where it was stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sglang_mixed.checkpoint import open_checkpoint
from sglang_mixed.config import MixedPrecisionMap
from sglang_mixed.errors import SensitivityError
from sglang_mixed.plan.candidates import Candidates, find_candidates
from sglang_mixed.sensitivity import Measure, Sensitivity, nominal_sensitivity, read_sensitivity, write_sensitivity
from sglang_mixed.sensitivity.progress import Progress
from sglang_mixed.sensitivity.weights import measure_weights

from ..engine.launch import TINY
from ..models import Tensors, write

FOLDERS = {"bf16": "bf16", "fp8": "fp8-block", "channel": "fp8-channel", "int8": "int8", "int4": "gptq-int4"}


@pytest.fixture
def trained() -> Candidates:
    return find_candidates(MixedPrecisionMap(TINY / "sources", {name: TINY / one for name, one in FOLDERS.items()}))


def test_the_error_is_that_of_the_decoded_weights(trained: Candidates) -> None:
    name = "model.layers.1.mlp.experts.5.down_proj"
    weight, coarse = (open_checkpoint(TINY / folder).dequantize(name) for folder in ("bf16", "gptq-int4"))
    found = measure_weights(trained).errors["int4"][name]
    assert found == pytest.approx(float((coarse - weight).square().sum() / weight.square().sum()), rel=1e-4)


def test_what_formats_are_expected_to_do_is_what_they_did_to_a_trained_model(trained: Candidates) -> None:
    expected, measured = nominal_sensitivity(trained), measure_weights(trained)
    assert set(expected.errors) == set(measured.errors) == set(FOLDERS) - {"bf16"}
    for source, errors in measured.errors.items():
        mean = sum(errors.values()) / len(errors)
        nominal = sum(expected.errors[source].values()) / len(errors)
        assert nominal / 1.4 < mean < nominal * 1.4, source


def test_smoothing_is_no_error_behind_its_norm(tmp_path: Path) -> None:
    layer, readers = "model.layers.0", ("q_proj", "k_proj", "v_proj")

    def smooth(tensors: Tensors) -> None:
        tensors[f"{layer}.input_layernorm.weight"].mul_(2)
        for reader in readers:
            tensors[f"{layer}.self_attn.{reader}.weight"].div_(2)
        tensors[f"{layer}.self_attn.o_proj.weight"].div_(2)

    sources = {"bf16": write(tmp_path / "bf16"), "smooth": write(tmp_path / "smooth", change=smooth)}
    found = measure_weights(find_candidates(MixedPrecisionMap(tmp_path / "sources", sources))).errors["smooth"]
    assert [found[f"{layer}.self_attn.{reader}"] for reader in readers] == [0, 0, 0]
    assert found[f"{layer}.self_attn.o_proj"] == 0.25


def test_a_measurement_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    sources = {kind: write(tmp_path / kind, kind) for kind in ("bf16", "fp8")}
    candidates = find_candidates(MixedPrecisionMap(tmp_path / "sources", sources))
    file, facts, counted = tmp_path / "partial", {"text": "a"}, []

    def stop(modules: int) -> None:
        counted.append(modules)
        if len(counted) == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Progress(file, facts) as progress:
        measure_weights(candidates, progress, stop)
    with file.open("a") as torn:
        torn.write('{"name": "model.lay')
    counted = []
    with Progress(file, facts) as progress:
        assert len(progress.done) == 5  # the first call tells of none
        found = measure_weights(candidates, progress, counted.append)
    assert counted[0] == 5 and sum(counted) == len(found.errors["fp8"])
    assert found.errors == measure_weights(candidates).errors
    with pytest.raises(SensitivityError, match="another measurement"):
        Progress(file, {"text": "b"})
    progress.finish()
    assert not file.exists()


def test_a_file_of_sensitivities_holds_the_value(tmp_path: Path) -> None:
    value = Sensitivity(Measure.DIVERGENCE, "bf16", {"fp8": {"a": 0.1}}, {"x.experts": (0.5, 1.5)}, {"tokens": 8})
    write_sensitivity(tmp_path / "s.json", value)
    assert read_sensitivity(tmp_path / "s.json") == value


VALID = '{"version": 1, "measure": "weight", "base": "b", "errors": {"a": {"m": 0}}, "uses": {}, "details": {}}'


@pytest.mark.parametrize(
    "text",
    ["", "[1]", "{}", VALID.replace("1", "2", 1), *(VALID.replace("0", bad) for bad in ("-1", "NaN", '"1"', "1e999"))],
)
def test_other_files_are_refused_by_name(tmp_path: Path, text: str) -> None:
    file = tmp_path / "s.json"
    file.write_text(text)
    with pytest.raises(SensitivityError) as caught:
        read_sensitivity(file)
    assert caught.value.file == str(file) and caught.value.remedy


def test_weights_of_zeros_have_no_relative_error(tmp_path: Path) -> None:
    def clear(tensors: Tensors) -> None:
        tensors["model.layers.0.self_attn.o_proj.weight"].zero_()

    sources = {"bf16": write(tmp_path / "bf16", change=clear), "gptq": write(tmp_path / "gptq", "gptq")}
    candidates = find_candidates(MixedPrecisionMap(tmp_path / "sources", sources))
    found = measure_weights(candidates).errors["gptq"]["model.layers.0.self_attn.o_proj"]
    assert torch.tensor(found).isfinite()
