"""Ranks on the CPU platform give one rank's answers (TP, EP, DP, tokenizer workers, two hosts), and end together."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from sglang_mixed.cli.proof import fetch_proof, print_proof
from sglang_mixed.client import every_rank
from sglang_mixed.engine.cpu.parallel import parse_cores, ranks_on_host, share_cores, use_route_to

from .comparison import REQUEST, differing_tokens, largest_difference
from .hosts import TwoHosts
from .launch import FLAGS, RUN_SCRIPT, TINY, Engine, Server, free_port, http, zygote
from .zygote import Job

# In BF16 a sum of two ranks' parts is rounded otherwise than one rank's: float32 shows whether they are the same sum.
EXACT = ("--dtype", "float32")
TOLERANCE = 1e-4


def mix(name: str) -> tuple[str, ...]:
    return "--enable-mixed-precision", "--mixed-precision-config", str(TINY / name)


MIX = mix("map.yaml")


@pytest.fixture(scope="module")
def one_rank(prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    log = tmp_path_factory.mktemp("one") / "log"
    engine = Engine(log, TINY / "bf16", {"input_ids": prompts, **REQUEST}, dtype="float32")
    answers: list[dict[str, Any]] = engine.result()["answers"][0]
    return answers


@contextlib.contextmanager
def serving(log: Path, *flags: str) -> Iterator[Server]:
    server = Server(log, "--model-path", TINY / "bf16", *flags, fresh=False)
    try:
        yield server
    finally:
        server.stop()


@pytest.mark.parametrize(
    "flags",
    ["--tp-size 2 --enable-ep-moe", "--tp-size 2 --dp-size 2"],
    ids=["tp2-ep2", "tp2-dp2"],
)
def test_stock_sglang_answers_alike_on_every_layout(
    flags: str, one_rank: list[dict[str, Any]], prompts: list[list[int]], tmp_path: Path
) -> None:
    with serving(tmp_path / "log", *flags.split(), *EXACT) as server:
        answers = server.wait().generate(prompts, **REQUEST)
    assert largest_difference(answers, one_rank) <= TOLERANCE
    assert differing_tokens(answers, one_rank) == []


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("four") / "log"
    with serving(log, *MIX, "--tp-size", "2", "--dp-size", "2", "--tokenizer-worker-num", "2") as server:
        server.wait()
        while log.read_text().count("Application startup complete") < 2:
            time.sleep(0.05)
        yield server


def test_every_tokenizer_worker_reports_every_rank(four_ranks: Server) -> None:
    fetch_proof(four_ranks.url)
    with ThreadPoolExecutor(10) as clients:
        # Each request is a new connection, which either worker may take.
        reports = list(clients.map(http, [f"{four_ranks.url}/mixed_precision"] * 20))
    for report in reports:
        assert [rank["verification"]["state"] for rank in every_rank(report)] == ["verified"] * 4
        (other,) = report.pop("data_parallel_ranks")
        for number, group in enumerate([report, other]):
            assert group["data_parallel_rank"] == number
            assert len(group.pop("modules")) == group["verification"]["modules"]
            ranks = group.pop("tensor_parallel_ranks")
            assert ranks[0] == group
            assert [rank["rank"]["number"] for rank in ranks] == [0, 1]


def test_the_printed_proof_has_a_line_for_every_rank(four_ranks: Server, capsys: pytest.CaptureFixture[str]) -> None:
    print_proof(fetch_proof(four_ranks.url), Console(width=200))
    lines = [line for line in capsys.readouterr().out.splitlines() if "bytes in memory" in line]
    assert [line.partition(":")[0] for line in lines] == ["rank 0", "rank 1", "rank 2", "rank 3"]


def test_a_mix_on_four_ranks_answers_requests(four_ranks: Server, prompts: list[list[int]]) -> None:
    assert all(len(answer["output_ids"]) == 8 for answer in four_ranks.generate(prompts, **REQUEST))


def test_every_tokenizer_worker_tells_what_all_ranks_counted(four_ranks: Server, prompts: list[list[int]]) -> None:
    url = f"{four_ranks.url}/mixed_precision/experts"
    http(f"{url}/reset", {})
    infos = [answer["meta_info"] for answer in four_ranks.generate(prompts, **REQUEST)]
    prefill = sum(info["prompt_tokens"] - info["cached_tokens"] for info in infos)
    with ThreadPoolExecutor(10) as clients:
        reports = list(clients.map(http, [url] * 20))
    for report in reports:
        assert [sum(layer) for layer in report["prefill"]] == [prefill * report["top_k"]] * 2
        assert [sum(layer) for layer in report["decode"]] == [len(prompts) * 7 * report["top_k"]] * 2


def node(log: Path, rank: int, address: str, *flags: str, first: str = "") -> Job:
    """One of two nodes that share a model."""
    nodes = ("--nnodes", "2", "--node-rank", str(rank), "--dist-init-addr", address, "--tp-size", "2")
    arguments = ("sglang", "serve", "--model-path", str(TINY / "bf16"), *nodes, *flags, *FLAGS)
    return zygote().start(log, RUN_SCRIPT, *arguments, "--skip-server-warmup", first=first)


def test_two_hosts_serve_one_model(one_rank: list[dict[str, Any]], prompts: list[list[int]], tmp_path: Path) -> None:
    # A map with one BF16 source: the weights are those of stock SGLang, and every rank reports.
    described = tmp_path / "map.yaml"
    described.write_text(f"mixed_precision: {{bf16_path: {TINY / 'bf16'}}}")
    with contextlib.ExitStack() as stack:
        try:
            hosts = stack.enter_context(TwoHosts())
        except OSError as error:
            pytest.skip(f"two hosts need network namespaces, which need root and iproute2: {error}")
        logs = [tmp_path / "0.log", tmp_path / "1.log"]
        for rank, host in enumerate(hosts):
            flags = ("--host", host.address, *mix(str(described)), *EXACT)
            job = node(logs[rank], rank, f"{hosts[0].address}:30100", *flags, first=host.enter)
            stack.callback(job.kill)
        url = f"http://{hosts[0].address}:30000"
        answers = hosts[0].run(lambda: ask(logs, url, {"input_ids": prompts, **REQUEST}))
        report = hosts[0].run(lambda: http(f"{url}/mixed_precision?modules=false"))
    assert largest_difference(answers, one_rank) <= TOLERANCE
    assert differing_tokens(answers, one_rank) == []
    assert [rank["rank"]["number"] for rank in report["tensor_parallel_ranks"]] == [0, 1]


def ask(logs: list[Path], url: str, request: dict[str, Any]) -> Any:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            http(f"{url}/model_info")
            return http(f"{url}/generate", request)
        time.sleep(0.1)
    raise AssertionError("no answer\n" + "\n".join(log.read_text() for log in logs))


def test_nodes_with_different_maps_end_with_our_message(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    jobs = [
        node(tmp_path / f"{rank}.log", rank, address, "--port", str(free_port()), *mix(name))
        for rank, name in enumerate(["map.yaml", "int4.yaml"])
    ]
    for rank, job in enumerate(jobs):
        assert_all_ended(job)
        assert "the ranks do not have one plan" in (tmp_path / f"{rank}.log").read_text()


def test_a_rank_that_is_killed_while_it_loads_ends_the_server(tmp_path: Path) -> None:
    log = tmp_path / "log"
    job = Server(log, "--model-path", TINY / "bf16", *MIX, "--tp-size", "2", fresh=False).job
    while not re.search(r"TP1\] Init (torch distributed|parallel) begin", text := log.read_text()):
        assert job.poll() is None and "fired up" not in text, text
        time.sleep(0.01)
    # In the order of their start: the fork that starts the others, multiprocessing's resource tracker, the two ranks.
    children = sorted(psutil.Process(job.pid).children(), key=lambda child: child.pid)
    children[3].send_signal(signal.SIGKILL)
    assert_all_ended(job)
    assert "fired up" not in log.read_text()


def assert_all_ended(job: Job) -> None:
    try:
        assert job.wait(120) != 0
        deadline = time.monotonic() + 20
        while (left := [one for one in psutil.process_iter() if is_left(one, job)]) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert left == []
    finally:
        job.kill()


def is_left(process: psutil.Process, job: Job) -> bool:
    with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
        return os.getsid(process.pid) == job.pid and process.status() != psutil.STATUS_ZOMBIE
    return False


@pytest.mark.parametrize(
    ("cores", "ranks", "shares"),
    [
        (range(8), 1, ["0,1,2,3,4,5,6,7"]),
        (range(8), 2, ["0,1,2,3", "4,5,6,7"]),
        (range(7), 3, ["0,1", "2,3", "4,5,6"]),
        ([4, 6], 4, ["4", "6", "4", "6"]),
    ],
)
def test_every_rank_has_a_share_of_the_cores(cores: Iterable[int], ranks: int, shares: list[str]) -> None:
    assert share_cores(list(cores), ranks) == shares


def test_the_operators_cores_are_read_as_sglang_writes_them() -> None:
    assert parse_cores("0-2,5") == {0, 1, 2, 5}


@pytest.mark.parametrize(
    ("arguments", "ranks"),
    [
        ({}, 1),
        ({"tp_size": 4, "dp_size": 2}, 8),
        ({"tp_size": 4, "nnodes": 2}, 2),
        ({"tp_size": 4, "dp_size": 4, "enable_dp_attention": True}, 4),
    ],
)
def test_ranks_of_one_host(arguments: dict[str, Any], ranks: int) -> None:
    defaults = {"tp_size": 1, "dp_size": 1, "pp_size": 1, "nnodes": 1, "enable_dp_attention": False}
    assert ranks_on_host(argparse.Namespace(**defaults | arguments)) == ranks


def test_ranks_listen_on_the_interface_that_leads_to_the_first_node(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "SGLANG_HOST_IP", "HOST_IP"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    use_route_to("127.0.0.1:5000")
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["SGLANG_HOST_IP"]) == ("lo", "127.0.0.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "chosen0")
    use_route_to("127.0.0.1:5000")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "chosen0"
