"""The commands that measure and plan, from sources to a map that the other commands take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sglang_mixed.cli.main import app
from sglang_mixed.plan import make_plan

from ..engine.launch import TINY

SOURCES = [f"{name}={TINY / folder}" for name, folder in {"bf16": "bf16", "int8": "int8", "int4": "gptq-int4"}.items()]


def invoke(*arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, [str(one) for one in arguments])
    assert result.exit_code == status, result.output
    return result.output if status else result.stdout


def test_from_weights_to_a_map_within_the_budget(tmp_path: Path) -> None:
    measured, file, picture = tmp_path / "s.json", tmp_path / "map.yaml", tmp_path / "map.png"
    found = json.loads(invoke("sensitivity", *SOURCES, "-o", measured, "--json"))
    assert found["measure"] == "weight" and set(found["errors"]) == {"int8", "int4"}
    assert (
        found["kinds"]["model.layers.*.mlp.experts.*"]["int4"] > found["kinds"]["model.layers.*.mlp.experts.*"]["int8"]
    )
    arguments = ("plan", "--sources", *SOURCES, "--budget", "4.5MB", "--sensitivity", measured, "-o", file)
    report = json.loads(invoke(*arguments, "--png", picture, "--json"))
    plan = make_plan(file)
    assert report["weight_bytes"] == report["rank_bytes"] == plan.weight_bytes() <= 4_500_000
    assert {module.source for module in plan.modules.values()} == {"bf16", "int8", "int4"}
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "this plan" in invoke(*arguments)


def test_bits_a_weight_and_a_map_for_sources(tmp_path: Path) -> None:
    file, again = tmp_path / "map.yaml", tmp_path / "again.yaml"
    report = json.loads(invoke("plan", *SOURCES, "--bits", 9, "-o", file, "--json"))
    assert 8.5 < report["bits"] <= 9 and report["measure"] == "nominal"
    repeated = json.loads(invoke("plan", file, "--bits", 9, "-o", again, "--json"))
    assert repeated["rows"] == report["rows"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([*SOURCES, "--budget", "1MB"], "the smallest that these sources give"),
        (SOURCES, "one of --budget and --bits"),
        ([*SOURCES, "--bits", "4", "--budget", "4MB"], "one of --budget and --bits"),
        ([*SOURCES, "--bits", "9", "--tp", "2"], "give --budget"),
        ([*SOURCES, "--budget", "much"], "no size"),
        ([SOURCES[0], "--bits", "9"], "two or more"),
        ([SOURCES[0], "int8"], "names no source"),
        ([SOURCES[0], "int8=/nowhere"], "no checkpoint folder"),
        ([*SOURCES, "--bits", "9", "--sensitivity", "/nowhere.json"], "cannot be read"),
    ],
)
def test_what_cannot_be_planned_is_one_message(tmp_path: Path, arguments: list[str], said: str) -> None:
    assert said in invoke("plan", *arguments, "-o", tmp_path / "map.yaml", status=1)
    assert not (tmp_path / "map.yaml").exists()


def test_a_text_that_is_too_short(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("import os")
    assert "at least one window" in invoke("sensitivity", *SOURCES, "--text", text, status=1)
