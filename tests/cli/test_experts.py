from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from sglang_mixed.cli.main import app
from sglang_mixed.experts import ExpertExport, ExpertFormats, read_export, write_export
from sglang_mixed.experts.balance import gini
from tests.experts.synthetic import counts

FORMATS = ExpertFormats(("FP8 128x128", "GPTQ int4 g128"), np.array([[0] * 3 + [1] * 5] * 2))


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Two exports of one model."""
    names = []
    for seed in (1, 2):
        names.append(str(tmp_path / f"{seed}.json"))
        write_export(names[-1], ExpertExport.of_counts(counts(seed=seed, tokens=1000), FORMATS))
    return names


def run(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["experts", *map(str, arguments)])
    return result.exit_code, result.output


def test_the_table_shows_the_most_active_experts_of_all_files_together(files: list[str]) -> None:
    total = counts(seed=1, tokens=1000).total + counts(seed=2, tokens=1000).total
    code, output = run(*files, "--top", "3")
    assert code == 0 and "most active experts" in output and "GPTQ int4 g128" in output
    layer, expert = np.unravel_index(total.argmax(), total.shape)
    line = next(line for line in output.splitlines() if line.split()[:2] == [str(layer), str(expert)])
    assert f"{total.max():,}" in line
    assert f"{total.sum():,} activations of 2,000 tokens" in output


def test_json_has_what_the_table_shows(files: list[str]) -> None:
    total = counts(seed=1, tokens=1000).total
    code, output = run(files[0], "--json", "--top", "4", "--layer", "1")
    shown = json.loads(output)
    assert code == 0
    assert [one["activation_count"] for one in shown["top_experts"]] == sorted(total[1].tolist())[:-5:-1]
    assert {one["layer_id"] for one in shown["top_experts"]} == {1}
    assert all(one["prefill"] + one["decode"] == one["activation_count"] for one in shown["top_experts"])
    (layer,) = shown["uneven_layers"]
    assert layer["gini"] == pytest.approx(gini(total)[1])


def test_merged_statistics_are_written_as_json_csv_and_picture(files: list[str], tmp_path: Path) -> None:
    out = {kind: tmp_path / f"out.{kind}" for kind in ("json", "csv", "png")}
    code, _ = run(*files, "--export", out["json"], "--csv", out["csv"], "--png", out["png"])
    assert code == 0
    merged = read_export(out["json"])
    assert merged.counts is not None
    assert merged.counts.total.tolist() == sum(read_export(file).grid()[1] for file in files).tolist()
    assert len(out["csv"].read_text().splitlines()) == 17
    assert out["png"].read_bytes().startswith(b"\x89PNG")


def test_an_older_export_is_shown_with_what_it_knows(files: list[str]) -> None:
    older = Path(files[0])
    value = json.loads(older.read_text())
    del value["sglang_mixed"]
    older.write_text(json.dumps(value))
    code, output = run(*files)
    assert code == 0 and "most active experts" in output and "tokens" not in output


def test_nothing_active_is_said_and_not_divided(tmp_path: Path) -> None:
    write_export(tmp_path / "a.json", ExpertExport(()))
    assert run(tmp_path / "a.json") == (0, "no expert was active yet\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["FILE", "--layer", "7"], "one of: 0, 1"),
        (["FILE", "--reset"], "a file cannot be reset"),
        (["FILE", "--export", "/no/such/folder/out.json"], "cannot be written"),
        (["/no/such/file.json"], "No such file"),
        (["FILE", "OTHER"], "added to"),
        (["http://127.0.0.1:9"], "Connection refused"),
        (["http://"], "no host given"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_one_message(files: list[str], tmp_path: Path, arguments: list[str], said: str) -> None:
    write_export(tmp_path / "other.json", ExpertExport.of_counts(counts(experts=4)))
    names = {"FILE": files[0], "OTHER": str(tmp_path / "other.json")}
    code, output = run(*(names.get(argument, argument) for argument in arguments))
    assert code == 1 and output.startswith("error: ") and said in output
