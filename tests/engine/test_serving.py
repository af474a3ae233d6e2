"""The main job: unmodified SGLang serves attention, FP8 experts and Int4 experts from three checkpoints."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_mixed.plan import Plan, make_plan

from .comparison import BOUND, REQUEST, differing_tokens, largest_difference
from .conftest import TINY, Server, http

MAP = TINY / "map.yaml"


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(MAP)


@pytest.fixture(scope="module")
def booting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    flags = ["--enable-mixed-precision", "--mixed-precision-config", MAP]
    server = Server(log, "--model-path", TINY / "bf16", *flags)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def reference(
    booting: Server, plan: Plan, prompts: list[list[int]], stock_answers: Callable[..., list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    # The reference runs while the server starts.
    return stock_answers(plan, prompts)


@pytest.fixture(scope="module")
def server(booting: Server, reference: list[dict[str, Any]]) -> Server:
    return booting.wait()


@pytest.fixture(scope="module")
def report(server: Server) -> dict[str, Any]:
    while (answer := http(f"{server.url}/mixed_precision"))["verification"]["state"] == "running":
        pass
    assert isinstance(answer, dict)
    return answer


def test_logprobs_and_greedy_tokens_equal_those_of_the_dequantized_model(
    server: Server, reference: list[dict[str, Any]], prompts: list[list[int]]
) -> None:
    answers = server.generate(prompts, **REQUEST)
    assert largest_difference(answers, reference) <= BOUND
    assert differing_tokens(answers, reference) == []


def test_a_chat_request_is_answered(server: Server) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "import os"}], "max_tokens": 8}
    assert http(f"{server.url}/v1/chat/completions", body)["choices"][0]["message"]["content"]


def test_every_module_comes_from_the_source_the_map_names(report: dict[str, Any]) -> None:
    expected = {"model.layers.0.mlp.experts.": "fp8", "model.layers.1.mlp.experts.": "gptq_int4"}
    for row in report["modules"]:
        source = next((source for prefix, source in expected.items() if row["module"].startswith(prefix)), "fp16")
        assert row["source"] == source, row["module"]


def test_memory_holds_what_the_plan_predicts_and_no_more(report: dict[str, Any], plan: Plan) -> None:
    assert report["weight_bytes"] == report["planned_bytes"] == plan.weight_bytes()
    assert report["weight_bytes"] < 0.75 * report["bf16_bytes"]
    assert report["bytes_read"] <= 1.02 * report["planned_bytes"]


def test_every_tensor_in_memory_hashes_to_the_bytes_of_its_file(report: dict[str, Any], plan: Plan) -> None:
    assert report["verification"]["state"] == "verified"
    assert report["verification"]["verified"] == len(report["modules"]) == len(plan.modules)
    for row in report["modules"]:
        for local, tensor in row["tensors"].items():
            entry = plan.checkpoints[row["source"]].entries[f"{row['module']}.{local}"]
            with Path(tensor["file"]).open("rb") as file:
                data = os.pread(file.fileno(), entry.end - entry.begin, entry.begin)
            assert tensor["sha256"] == tensor["memory_sha256"] == hashlib.sha256(data).hexdigest()


def test_totals_by_format_and_kind_add_up(report: dict[str, Any]) -> None:
    for totals in (report["by_format"], report["by_module_kind"]):
        assert sum(total["bytes"] for total in totals.values()) == report["weight_bytes"]
        assert sum(total["bf16_bytes"] for total in totals.values()) == report["bf16_bytes"]
    assert report["compression_ratio"] == report["bf16_bytes"] / report["weight_bytes"]


def test_updating_weights_from_one_checkpoint_is_refused(server: Server) -> None:
    import urllib.error

    with pytest.raises(urllib.error.HTTPError) as refused:
        http(f"{server.url}/update_weights_from_disk", {"model_path": str(TINY / "bf16")})
    assert "weights of a mixed model cannot be updated" in refused.value.read().decode()
