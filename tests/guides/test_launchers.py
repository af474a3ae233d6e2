"""The TP/DP guide and the native-integration guide: every launcher, started, asked and stopped, and their errors."""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sglang_mixed.cli.nodes import Place, place_of
from sglang_mixed.cli.serve import Launch, parse_address, placed
from sglang_mixed.engine.arguments import from_cli_args
from sglang_mixed.errors import ParallelismError, UnsupportedError
from sglang_mixed.preflight import check_devices

from ..engine.launch import TINY, free_port, http
from ..engine.zygote import ROOT, Job
from .jobs import SMALL, run_python, start, words

LONG = """python -m sglang.launch_server --model-path MODEL --enable-mixed-precision --mixed-precision-config MAP \\
    --attention-backend torch_native --sampling-backend pytorch --disable-cuda-graph --disable-cuda-graph-padding \\
    --kv-cache-dtype auto --allow-auto-truncate --chunked-prefill-size 16384 --dtype bfloat16 --device cpu \\
    --trust-remote-code --host 127.0.0.1 --port PORT"""


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
    log = tmp_path / "log"
    status, printed = ended(start(log, command, *SMALL, PORT=free_port()), log)
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
    job = start(log, LONG, *SMALL, PORT=port)
    try:
        assert answer(job, log, f"http://127.0.0.1:{port}")["compression_ratio"] > 1.7
    finally:
        job.kill()


def test_the_python_launcher_tests_itself(tmp_path: Path) -> None:
    command = """python launch_sglang_mixed_precision.py --model MODEL --mixed-precision-config MAP --device cpu \\
        --dtype auto --test"""
    log = tmp_path / "log"
    status, printed = ended(start(log, command, *SMALL, "--port", str(free_port())), log)
    assert status == 0 and "The capital of France is" in printed, printed


MIX = "--enable-mixed-precision --mixed-precision-config MAP"
#: A guide's command -> SGLang's. Placeholders of paths are ours, as everywhere in these tests.
COMMANDS = {
    # API guide
    "./start_sglang_mixed_precision.sh -m MODEL -c MAP": MIX,
    "./start_sglang_mixed_precision.sh -m MODEL -c MAP -a 0.0.0.0:8000 --enable-mixed-precision": (
        f"--host 0.0.0.0 --port 8000 {MIX}"
    ),
    "python launch_enhanced_server.py --config MAP --model MODEL": MIX,
    # TP/DP guide
    "./start_mixed_precision_tp_dp.sh -m MODEL -c MAP": f"--tp-size 4 --dp-size 2 {MIX}",
    "./start_mixed_precision_tp_dp.sh -m MODEL --config MAP -t 2 -d 2 --test": f"--tp-size 2 --dp-size 2 {MIX}",
    "./start_mixed_precision_tp_dp.sh -m MODEL -c MAP -a 192.168.1.100:50000 --dtype auto": (
        f"--tp-size 4 --dp-size 2 {MIX} --dtype auto"
    ),
    "./start_mixed_precision_tp_dp.sh -m MODEL -c MAP -a node0:50000 --rank 0 --ranks-per-node 4": (
        f"--tp-size 4 --dp-size 1 --port 8080 {MIX}"
    ),
    "./start_mixed_precision_tp_dp.sh -m MODEL -c MAP --dist-addr node0:50000 --rank 4 --ranks-per-node 4": (
        f"--tp-size 4 --dp-size 1 --port 8084 {MIX}"
    ),
    "./start_mixed_precision_tp_dp.sh -m MODEL -c MAP -t 8 -d 1 -a node0:50000 --rank 4 --ranks-per-node 4": (
        f"--tp-size 8 --dp-size 1 --port 8084 --nnodes 2 --node-rank 1 --dist-init-addr node0:50000 {MIX}"
    ),
    # Native-integration guide
    "./start_mixed_precision_sglang.sh -m MODEL -t 4 -d 2 --dtype bfloat16 --max-running-requests 32": (
        "--tp-size 4 --dp-size 2 --dtype bfloat16 --max-running-requests 32"
    ),
    """./start_mixed_precision_sglang.sh -m MODEL -c MAP --enable-mixed-precision -t 4 -d 2 \\
        --dtype bfloat16 --max-running-requests 32""": (
        f"--tp-size 4 --dp-size 2 {MIX} --dtype bfloat16 --max-running-requests 32"
    ),
    """./start_mixed_precision_sglang.sh -m MODEL --enable-mixed-precision -c MAP \\
        --tp-size 4 --dp-size 2 --ep-size 1 --max-running-requests 32 --max-total-tokens 40960 \\
        --dtype bfloat16 --trust-remote-code --attention-backend torch_native --sampling-backend pytorch \\
        --disable-cuda-graph --disable-cuda-graph-padding --kv-cache-dtype auto --allow-auto-truncate \\
        --chunked-prefill-size 16384""": (
        f"--tp-size 4 --dp-size 2 --ep-size 1 {MIX} --max-running-requests 32 --max-total-tokens 40960 "
        "--dtype bfloat16 --trust-remote-code --attention-backend torch_native --sampling-backend pytorch "
        "--disable-cuda-graph --disable-cuda-graph-padding --kv-cache-dtype auto --allow-auto-truncate "
        "--chunked-prefill-size 16384"
    ),
    """./start_mixed_precision_sglang.sh -m MODEL -c MAP --enable-mixed-precision -t 4 -d 2 -e 1 \\
        --enable-ep-moe --max-running-requests 32 --dtype bfloat16 --trust-remote-code""": (
        f"--tp-size 4 --dp-size 2 --ep-size 1 {MIX} --enable-ep-moe --max-running-requests 32 --dtype bfloat16 "
        "--trust-remote-code"
    ),
    """./start_mixed_precision_sglang.sh -m MODEL -c MAP --enable-mixed-precision -t 2 -d 2 \\
        --max-running-requests 16 --dtype bfloat16""": (
        f"--tp-size 2 --dp-size 2 {MIX} --max-running-requests 16 --dtype bfloat16"
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_guides_command_is_sglangs(command: str) -> None:
    program, *rest = words(command)
    given = [str(ROOT / "scripts" / program), *rest] if program != "python" else [sys.executable, *rest]
    assert command_line(*given) == words(COMMANDS[command])


PARSING = """
import argparse
import sglang_mixed
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.server_args import ServerArgs

for line in LINES:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    ServerArgs.add_cli_args(parser)
    args = parser.parse_args(["--model-path", "MODEL", *line])
    assert args.enable_mixed_precision == (args.mixed_precision_config is not None)
for described in (args.mixed_precision_config, None):
    config = ModelConfig(model_path="MODEL", mixed_precision_config=described if args.enable_mixed_precision else None)
    assert (config.quantization == "mixed_precision") == (described is not None)
print("parsed")
"""


def test_sglang_takes_every_flag_of_the_guides(tmp_path: Path) -> None:
    lines = [words(line) for line in COMMANDS.values()]
    assert "parsed" in run_python(tmp_path / "log", PARSING.replace("LINES", repr(lines)))


def test_the_guides_loop_starts_every_rank() -> None:
    loop = """for rank in {0..3}; do
        PYTHON launch_mixed_precision_tp_dp.py --model MODEL --mixed-precision-config MAP --tp-size 2 --dp-size 2 \\
            --rank $rank --world-size 4 --dist-init-addr "127.0.0.1:50000" --dtype auto --dry-run
    done; wait"""
    script = loop.replace("PYTHON", sys.executable).replace("MODEL", words("MODEL")[0]).replace("MAP", words("MAP")[0])
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    found = [dict(zip(line.split()[5::2], line.split()[6::2], strict=False)) for line in done.stdout.splitlines()]
    places = [(one["--node-rank"], one["--port"], one["--dist-init-addr"]) for one in found]
    # Ranks 2 and 3 are the second copy of the model, and meet at an address of their own.
    assert places == [
        ("0", "8080", "127.0.0.1:50000"),
        ("1", "8081", "127.0.0.1:50000"),
        ("0", "8082", "127.0.0.1:50001"),
        ("1", "8083", "127.0.0.1:50001"),
    ]
    assert all((one["--tp-size"], one["--dp-size"], one["--nnodes"]) == ("2", "1", "2") for one in found)


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("start_*.sh")), ids=lambda path: path.name)
def test_a_script_tells_its_options(script: Path) -> None:
    done = subprocess.run([script, "--help"], capture_output=True, text=True, check=True, env=with_scripts())
    assert all(option in done.stdout for option in ("--model", "--tp", "--dp", "--ep", "--test", "--rank"))


def test_without_a_map_plain_sglang_is_started() -> None:
    launcher = [sys.executable, str(ROOT / "launch_sglang_mixed_precision.py")]
    printed = command_line(*launcher, *words("--model MODEL --device cpu --dtype bfloat16"))
    assert printed == ["--device", "cpu", "--dtype", "bfloat16"]


def test_a_nodes_first_rank_tells_its_place() -> None:
    launch = placed(Launch("model", tp=16, port=30000, dist_init_addr="host0:20000"), 8, 8, None)
    found = ["--port", "30008", "--nnodes", "2", "--node-rank", "1", "--dist-init-addr", "host0:20000"]
    assert launch.arguments == ["--model-path", "model", "--tp-size", "16", "--dp-size", "1", *found]
    with pytest.raises(UnsupportedError, match="2 processes make one server, and do not know where to meet"):
        placed(Launch("model", tp=16), 8, 8, None)


def test_copies_on_one_host_meet_apart_and_are_told_how_to_get_one_address(capsys: pytest.CaptureFixture[str]) -> None:
    launch = Launch("model", tp=2, dp=2, port=30000, dist_init_addr="127.0.0.1:20000")
    meetings = [placed(launch, rank, 1, 4).dist_init_addr for rank in range(4)]
    assert meetings == ["127.0.0.1:20000", "127.0.0.1:20000", "127.0.0.1:20001", "127.0.0.1:20001"]
    assert capsys.readouterr().err.count("--worker-urls http://127.0.0.1:30000 http://127.0.0.1:30002") == 2


def command_line(*command: str) -> list[str]:
    """What `--dry-run` prints, without what is the same always."""
    done = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, check=True, env=with_scripts())
    python, module, name, flag, model, *rest = done.stdout.split()
    assert (python, module, name, flag, model) == (
        "python",
        "-m",
        "sglang.launch_server",
        "--model-path",
        str(TINY / "bf16"),
    )
    return rest


def with_scripts() -> dict[str, str]:
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


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
