"""`sglang-mixed export`: the command over the export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sglang_mixed.cli.export import parse_size
from sglang_mixed.cli.main import app
from sglang_mixed.errors import MapError
from sglang_mixed.plan import make_plan

MAP = Path(__file__).parents[2] / "examples" / "tiny" / "experts.yaml"
RUNNER = CliRunner()


def test_it_writes_what_it_says_and_check_reads_it(tmp_path: Path) -> None:
    target = tmp_path / "out"
    result = RUNNER.invoke(app, ["export", str(MAP), str(target), "--max-shard-size", "2MB", "--json"])
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["shards"] == sorted(path.name for path in target.glob("*.safetensors"))
    assert report["bytes"] == sum((target / name).stat().st_size for name in report["shards"])
    checked = json.loads(RUNNER.invoke(app, ["check", str(target), "--json"]).stdout)
    assert checked["weight_bytes"] == make_plan(MAP).weight_bytes()
    again = RUNNER.invoke(app, ["export", str(MAP), str(target)])
    assert again.exit_code == 1 and "error: the target exists" in again.stderr


def test_it_says_how_to_serve_it(tmp_path: Path) -> None:
    result = RUNNER.invoke(app, ["export", str(MAP), str(tmp_path / "out")])
    assert "175 tensors of 69 modules from 5 sources: 4.69 MiB in 1 file" in result.stdout
    assert f"sglang serve --model-path {tmp_path / 'out'}" in result.stdout


@pytest.mark.parametrize(
    ("text", "nbytes"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 << 19), ("700", 700), ("2g", 2 * 10**9), ("1TiB", 1 << 40)]
)
def test_sizes_of_files(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "5 apples", "-1GB", "0"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(MapError, match="no size of a file"):
        parse_size(text)
