"""The routes over HTTP on real servers: what they answer, to whom, and that a reset under load loses nothing."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from sglang_mixed.experts import ExpertCounts, ExpertExport
from sglang_mixed.plan import make_plan

from .conftest import TINY, Server, http

MAP = TINY / "experts.yaml"
FLAGS = ("--model-path", TINY / "bf16", "--enable-mixed-precision", "--mixed-precision-config", MAP)
LAYERS, EXPERTS, TOP_K = 2, 8, 2
SAMPLING = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
USER, ADMIN = "a user's key", "an admin's key"


@pytest.fixture(scope="module")
def starting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    keys = ("--api-key", USER, "--admin-api-key", ADMIN)
    server = Server(tmp_path_factory.mktemp("guarded") / "log", *FLAGS, *keys, fresh=False)
    yield server
    server.job.kill()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, starting: Server) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server") / "log", *FLAGS, "--disable-radix-cache", fresh=False)
    yield server.wait()
    server.job.kill()


@pytest.fixture(scope="module")
def guarded(starting: Server) -> Server:
    deadline = time.monotonic() + 300
    while status(f"{starting.url}/model_info", "GET", USER) != 200:
        assert starting.job.poll() is None and time.monotonic() < deadline, starting.log.read_text()
        time.sleep(0.1)
    return starting


def counts_in(export: dict[str, Any]) -> ExpertCounts:
    counts = ExpertExport.from_json(export).counts
    assert counts is not None
    return counts


def reset(server: Server) -> ExpertCounts:
    return counts_in(http(f"{server.url}/mixed_precision/experts/reset", {}))


def rows(answers: list[dict[str, Any]]) -> tuple[int, int]:
    """Tokens that the requests put through the model: in prefill and, but for each one's last token, in decode."""
    infos = [answer["meta_info"] for answer in answers]
    return sum(one["prompt_tokens"] for one in infos), sum(one["completion_tokens"] - 1 for one in infos)


def status(url: str, method: str, key: str | None) -> int:
    """The HTTP status; 0 where nothing answers."""
    request = urllib.request.Request(url, method=method, data=b"{}" if method == "POST" else None)
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return int(response.status)
    except urllib.error.HTTPError as refused:
        return refused.code
    except OSError:
        return 0


def test_the_report_and_the_export_hold_what_was_counted(server: Server, prompts: list[list[int]]) -> None:
    reset(server)
    prefill, decode = rows(server.generate(prompts, sampling_params=SAMPLING))
    report = http(f"{server.url}/mixed_precision/experts?top=3")
    assert np.array(report["prefill"]).sum(axis=1).tolist() == [prefill * TOP_K] * LAYERS
    assert np.array(report["decode"]).sum(axis=1).tolist() == [decode * TOP_K] * LAYERS
    assert len(report["top_experts"]) == 3
    one = http(f"{server.url}/mixed_precision/experts?layer=1")
    assert one["layers"] == [1] and one["prefill"] == report["prefill"][1:]
    with urllib.request.urlopen(f"{server.url}/mixed_precision/experts.json") as response:
        assert response.headers["Content-Disposition"] == 'attachment; filename="experts.json"'
        export = json.load(response)
    assert counts_in(export).prefill.tolist() == report["prefill"]
    first = export["expert_stats"]["layer_0_expert_0"]
    assert first["activation_count"] == report["prefill"][0][0] + report["decode"][0][0]
    assert export["layer_stats"]["1"]["total_experts"] == EXPERTS


def test_each_expert_is_reported_in_the_format_the_plan_gives_it(server: Server) -> None:
    formats = http(f"{server.url}/mixed_precision/experts")["formats"]
    labels = {"fp8": "FP8 128x128", "gptq_int4": "GPTQ int4 g128", "int8": "INT8 channel"}
    modules = make_plan(MAP).modules
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            source = modules[f"model.layers.{layer}.mlp.experts.{expert}.up_proj"].source
            assert formats["labels"][formats["cells"][layer][expert]] == labels[source]


def test_resets_under_load_lose_no_count(server: Server, prompts: list[list[int]]) -> None:
    reset(server)
    with ThreadPoolExecutor(4) as clients:
        pending = [clients.submit(server.generate, prompts[first::10], sampling_params=SAMPLING) for first in range(10)]
        cleared = [reset(server)]
        while not all(one.done() for one in pending):
            cleared.append(reset(server))
        prefill, decode = map(sum, zip(*(rows(one.result()) for one in pending), strict=True))
    total = sum(cleared[1:], cleared[0]) + reset(server)
    assert sum(one.total.any() for one in cleared) > 2, "the resets came between the requests"
    assert total.prefill.sum(axis=1).tolist() == [prefill * TOP_K] * LAYERS
    assert total.decode.sum(axis=1).tolist() == [decode * TOP_K] * LAYERS


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("layer=7", "layer 7 has no experts"),
        ("layer=first", "layer is a whole number from 0"),
        ("layer=-1", "layer is a whole number from 0"),
        ("top=1.5", "top is a whole number from 0"),
        ("top=", "top is a whole number from 0"),
        ("top=99999999999999999999", "top is a whole number from 0"),
    ],
)
def test_a_query_that_makes_no_sense_is_refused_with_the_reason(server: Server, query: str, message: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        http(f"{server.url}/mixed_precision/experts?{query}")
    assert refused.value.code == 400
    assert message in json.loads(refused.value.read())["error"]


@pytest.mark.parametrize("key", [None, USER, ADMIN])
def test_the_same_keys_open_our_routes_as_sglangs_own(guarded: Server, key: str | None) -> None:
    for ours, theirs, method in (
        ("/mixed_precision", "/server_info", "GET"),
        ("/mixed_precision/experts", "/server_info", "GET"),
        ("/mixed_precision/experts.json", "/server_info", "GET"),
        ("/mixed_precision/experts/reset", "/flush_cache", "POST"),
    ):
        expected = status(guarded.url + theirs, method, key)
        assert status(guarded.url + ours, method, key) == expected == (200 if key == _opens(method) else 401), ours


def _opens(method: str) -> str:
    return USER if method == "GET" else ADMIN


def test_without_keys_all_routes_are_open_as_sglangs_own_are(server: Server) -> None:
    for path, method in (("/mixed_precision/experts", "GET"), ("/mixed_precision/experts/reset", "POST")):
        assert status(server.url + path, method, None) == status(server.url + "/server_info", "GET", None) == 200


def test_the_page_opens_without_a_key_and_holds_no_data(guarded: Server) -> None:
    with urllib.request.urlopen(f"{guarded.url}/mixed_precision/page") as response:
        text = response.read().decode()
    assert text.startswith("<!") and str(TINY) not in text and "FP8 128x128" not in text
