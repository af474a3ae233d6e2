"""The TP/DP guide and the native-integration guide: every launcher, started, asked and stopped, and their errors."""

from __future__ import annotations

import argparse
import contextlib
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from sglang_mixed.cli.nodes import Place, place_of
from sglang_mixed.cli.serve import Launch, parse_address
from sglang_mixed.engine.arguments import from_cli_args
from sglang_mixed.errors import ParallelismError, UnsupportedError
from sglang_mixed.preflight import check_devices

from ..engine.launch import http
from ..engine.ports import free_port, port_was_taken
from ..engine.zygote import Job
from .jobs import SMALL, start, with_scripts, words

LONG = """python -m sglang.launch_server --model-path MODEL --enable-mixed-precision --mixed-precision-config MAP \\
    --attention-backend torch_native --sampling-backend pytorch --disable-cuda-graph --disable-cuda-graph-padding \\
    --kv-cache-dtype auto --allow-auto-truncate --chunked-prefill-size 16384 --dtype bfloat16 --device cpu \\
    --trust-remote-code --host 127.0.0.1 --port PORT"""


def one_copy() -> tuple[str, ...]:
    """Where the ranks of a model's only copy meet; those of several choose for themselves."""
    return "--nccl-port", str(free_port())


def ended(job: Job, log: Path, seconds: float = 180) -> tuple[int, str]:
    try:
        return job.wait(seconds), log.read_text()
    finally:
        job.kill()


def answer(job: Job, log: Path, url: str, path: str = "/mixed_precision?modules=false") -> Any:
    deadline = time.monotonic() + 180
    while job.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            return http(f"{url}{path}")
        time.sleep(0.1)
    raise AssertionError(log.read_text())


def test_serve_tests_itself_at_tp_2_dp_2_with_ep(tmp_path: Path) -> None:
    command = "sglang-mixed serve -m MODEL -c MAP -t 2 -d 2 -a 127.0.0.1:PORT --test --enable-ep-moe --api-key secret"
    for attempt in range(2):
        log = tmp_path / str(attempt)
        status, printed = ended(start(log, command, *SMALL, PORT=free_port()), log)
        if not port_was_taken(log):
            break
    assert status == 0, printed
    assert "The capital of France is" in printed
    # Every rank of an expert-parallel pair holds half of the 48 experts' matrices, and all other 21 modules.
    assert f"4 ranks: {4 * (24 + 21)} modules in memory have the SHA-256 of their files" in printed


def test_one_process_per_rank_started_by_hand_joins_one_server(tmp_path: Path) -> None:
    command = """python launch_mixed_precision_tp_dp.py --model MODEL --mixed-precision-config MAP
        --tp-size 2 --dp-size 1 --rank RANK --world-size 2 --dist-init-addr 127.0.0.1:MEETING
        --host 127.0.0.1 --port PORT"""
    port, meeting, logs = free_port(), free_port(), [tmp_path / "0", tmp_path / "1"]
    jobs = [start(log, command, *SMALL, RANK=rank, MEETING=meeting, PORT=port) for rank, log in enumerate(logs)]
    try:
        report = answer(jobs[0], logs[0], f"http://127.0.0.1:{port}")
        assert [rank["rank"]["number"] for rank in report["tensor_parallel_ranks"]] == [0, 1]
    finally:
        for job in jobs:
            job.kill()


def test_the_guides_long_command_line_starts_as_written(tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    job = start(log, LONG, *SMALL, *one_copy(), PORT=port)
    try:
        assert answer(job, log, f"http://127.0.0.1:{port}")["compression_ratio"] > 1.7
    finally:
        job.kill()


def test_the_python_launcher_tests_itself(tmp_path: Path) -> None:
    command = """python launch_sglang_mixed_precision.py --model MODEL --mixed-precision-config MAP --device cpu \\
        --dtype auto --test"""
    log = tmp_path / "log"
    status, printed = ended(start(log, command, *SMALL, *one_copy(), "--port", str(free_port())), log)
    assert status == 0 and "The capital of France is" in printed, printed


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        ((4, 2, 0, 8), Place(1, 0, 2, 0, 1)),
        ((4, 2, 4, 4), Place(1, 0, 1, 1, 2)),
        ((16, 1, 8, 8), Place(2, 1, 1, 0, 1)),
        ((8, 2, 12, 4), Place(2, 1, 1, 1, 2)),
        ((2, 2, 3, 1, 4), Place(2, 1, 1, 1, 2)),
        ((2, 1, 0, 64), Place(1, 0, 1, 0, 1)),
    ],
)
def test_ranks_become_nodes_and_copies(arguments: tuple[int, ...], place: Place) -> None:
    assert place_of(*arguments) == place


@pytest.mark.parametrize("arguments", [(4, 2, 1, 4), (4, 2, 8, 4), (4, 1, 0, 3), (4, 2, 0, 8, 4), (4, 3, 0, 8)])
def test_ranks_that_have_no_place_are_refused(arguments: tuple[int, ...]) -> None:
    with pytest.raises(ParallelismError):
        place_of(*arguments)


def test_too_few_gpus_are_told_before_anything_loads() -> None:
    with pytest.raises(ParallelismError, match=r"not enough GPUs: 8 needed \(tp 4 × dp 2\), 4 available"):
        check_devices(4, 2, 1, 4)
    check_devices(4, 2, 2, 4)
    check_devices(4, 2, 1, None)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("-m MODEL -c config.yaml", "mixed precision config file does not exist: config.yaml"),
        ("-m ./no-such-model -c MAP", "model path does not exist: ./no-such-model"),
        ("-m MODEL -c MAP -a 127.0.0.1:TAKEN", "address already in use: 127.0.0.1:TAKEN"),
    ],
)
def test_errors_end_the_start_with_one_message(changed: str, message: str) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        taken = str(listener.getsockname()[1])
        command = ["sglang-mixed", "serve", *words(changed, TAKEN=taken)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=with_scripts())
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {message.replace('TAKEN', taken)}")


def test_sglangs_own_launcher_tells_the_same() -> None:
    model, described = words("MODEL MAP")
    given = {"enable_mixed_precision": True, "mixed_precision_config": described, "model_path": model}
    layout = {"tp_size": 1, "dp_size": 1, "nnodes": 1, "enable_dp_attention": False, "device": None}
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = {"host": "127.0.0.1", "port": listener.getsockname()[1]}
        namespace = argparse.Namespace(**given, **layout, **address, explicit_arguments={"port", "host"})
        with pytest.raises(SystemExit, match="address already in use"):
            from_cli_args(lambda args: args, object, namespace)


@pytest.mark.parametrize(
    "flags", [("--api-key", "secret"), ("--api-key=secret", "--device", "cpu"), ("--device", "cpu")]
)
def test_the_servers_key_is_known_to_its_test(flags: tuple[str, ...]) -> None:
    assert Launch("model", flags=flags).api_key == ("secret" if "secret" in "".join(flags) else None)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("0.0.0.0:8000", ("0.0.0.0", 8000)),
        ("host", ("host", None)),
        (":80", ("127.0.0.1", 80)),
        ("[::1]:80", ("::1", 80)),
        ("[::1]", ("::1", None)),
    ],
)
def test_addresses(text: str, address: tuple[str, int | None]) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["host:0", "host:65536", "host:http"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(UnsupportedError, match="not an address"):
        parse_address(text)
