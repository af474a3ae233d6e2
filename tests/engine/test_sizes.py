"""Engines hold and read the bytes that `size` predicts, and an exported mix is the model that its map describes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sglang_mixed.export import export
from sglang_mixed.plan import make_plan

from .comparison import REQUEST
from .launch import TINY, Engine
from .random_maps import differences, random_map, start

#: (seed, tp); `python -m tests.engine.random_maps 10` tries more.
MAPS = [(0, 1), (1, 2), (2, 1)]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, prompts: list[list[int]]) -> dict[str, tuple[Path, Engine]]:
    """Every engine of this module and its map; the first also as an export, served without any flag of ours."""
    folder = tmp_path_factory.mktemp("sizes")
    maps = {f"{seed} tp{tp}": (random_map(folder, seed), tp) for seed, tp in MAPS}
    request = {"input_ids": prompts[:8], **REQUEST}
    engines = {name: (file, start(folder / f"{name}.log", file, tp, request)) for name, (file, tp) in maps.items()}
    file = maps["0 tp1"][0]
    export(make_plan(file, base=TINY / "bf16"), folder / "exported", 1_000_000)
    return {**engines, "exported": (file, Engine(folder / "exported.log", folder / "exported", request))}


@pytest.fixture(scope="module")
def results(running: dict[str, tuple[Path, Engine]]) -> dict[str, dict[str, Any]]:
    return {name: engine.result() for name, (_, engine) in running.items()}


@pytest.mark.parametrize(("seed", "tp"), MAPS)
def test_engines_hold_and_read_the_predicted_bytes(
    seed: int, tp: int, running: dict[str, tuple[Path, Engine]], results: dict[str, dict[str, Any]]
) -> None:
    name = f"{seed} tp{tp}"
    assert differences(running[name][0], tp, results[name]["memory"]) == {}


def test_an_export_is_served_without_a_flag_and_answers_as_its_map(results: dict[str, dict[str, Any]]) -> None:
    mapped, exported = results["0 tp1"], results["exported"]
    for ours, theirs in zip(exported["answers"][0], mapped["answers"][0], strict=True):
        assert ours["output_ids"] == theirs["output_ids"]
        for key in ("input_token_logprobs", "output_token_logprobs"):
            assert ours["meta_info"][key] == theirs["meta_info"][key]
    same = ("weight_bytes", "planned_bytes", "bf16_bytes", "by_format", "by_module_kind", "bytes_read")
    assert {key: exported["memory"][key] for key in same} == {key: mapped["memory"][key] for key in same}
