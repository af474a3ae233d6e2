"""`sglang-mixed check`: a table, JSON, or one message; quick, and without an engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sglang_mixed.cli.check import human
from sglang_mixed.cli.main import app
from sglang_mixed.plan import make_plan

from ..models import write, write_map

TINY = Path(__file__).parents[2] / "examples" / "tiny"
RUNNER = CliRunner()


def test_the_table() -> None:
    result = RUNNER.invoke(app, ["check", str(TINY / "map.yaml")])
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["model.layers.0.mlp.experts.*.{down_proj,gate_proj,up_proj}", "fp8", "FP8", "128x128", "24"] in [
        line[:5] for line in lines
    ]
    assert "the map is sound" in result.stdout and "69 modules" in result.stdout


def test_json_has_the_exact_figures() -> None:
    result = RUNNER.invoke(app, ["check", str(TINY / "map.yaml"), "--json", "--tp", "2"])
    report = json.loads(result.stdout)
    plan = make_plan(TINY / "map.yaml")
    assert report["weight_bytes"] == plan.weight_bytes() and report["rank_bytes"] == plan.weight_bytes(2)
    assert report["file_bytes"] == plan.file_bytes and report["bf16_bytes"] == plan.bf16_bytes
    assert report["fingerprint"] == plan.fingerprint and report["warnings"] == []


def test_warnings_are_printed(tmp_path: Path) -> None:
    file = write_map(tmp_path, {}, a=write(tmp_path / "a"), b=write(tmp_path / "b"))
    result = RUNNER.invoke(app, ["check", str(file)])
    assert result.exit_code == 0 and "warning: source 'b' is declared and gives no weight" in result.stdout


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_an_error_is_one_message_and_status_1(tmp_path: Path, as_json: list[str]) -> None:
    file = write_map(tmp_path, {"model.nrm": "a"}, a=write(tmp_path / "a"))
    result = RUNNER.invoke(app, ["check", str(file), *as_json])
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.startswith("error: the pattern 'model.nrm' matches no weight of the model (did you mean")
    assert f"file:   {file}:4" in result.stderr and "Traceback" not in result.stderr


def test_the_base_and_the_override(tmp_path: Path) -> None:
    sources = {"a": write(tmp_path / "a"), "b": write(tmp_path / "b", "fp8", seed=1)}
    file = write_map(tmp_path, {"**.experts.**": "b"}, **sources)
    assert RUNNER.invoke(app, ["check", str(file)]).exit_code == 1
    allowed = RUNNER.invoke(app, ["check", str(file), "--allow-different-base"])
    assert allowed.exit_code == 0 and "another model" in allowed.stdout
    based = RUNNER.invoke(
        app, ["check", str(file), "--json", "--allow-different-base", "--model-path", str(sources["b"])]
    )
    assert json.loads(based.stdout)["base"] == "b"
    missing = RUNNER.invoke(app, ["check", str(file), "--model-path", "No/Such"])
    assert missing.exit_code == 1 and "hf download No/Such" in missing.stderr


def test_no_engine_is_imported_and_help_needs_no_torch() -> None:
    script = (
        "import sys; sys.modules['sglang'] = None\n"
        "from typer.testing import CliRunner; from sglang_mixed.cli.main import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "assert 'torch' not in sys.modules\n"
        f"result = CliRunner().invoke(app, ['check', {str(TINY / 'map.yaml')!r}])\n"
        "assert result.exit_code == 0, result.output\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (3 << 29, "1.50 GiB"), (5 << 50, "5120.00 TiB")],
)
def test_sizes_for_people(nbytes: int, text: str) -> None:
    assert human(nbytes) == text


def test_a_cut_inside_blocks_is_told_with_its_bytes() -> None:
    result = RUNNER.invoke(app, ["check", str(TINY / "map.yaml"), "--json", "--tp", "4"])
    report = json.loads(result.stdout)
    assert "model.layers.{0..1}.mlp.experts.{0..7}.down_proj" in report["torn"]
    assert sum(report["ranks_bytes"]) > report["weight_bytes"]
    shown = RUNNER.invoke(app, ["check", str(TINY / "map.yaml"), "--tp", "4"])
    assert "cut inside a block, group or word" in shown.stdout


def test_a_layout_that_cannot_be_names_sizes_and_what_can() -> None:
    result = RUNNER.invoke(app, ["check", str(TINY / "map.yaml"), "--tp", "3"])
    assert result.exit_code == 1
    assert "256 columns cannot be cut in 3" in result.stderr and "choose --tp / --ep of 1, 2, 4" in result.stderr
