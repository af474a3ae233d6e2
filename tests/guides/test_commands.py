"""What the guides' commands come to: SGLang's command line, its flags, and each rank's place. Nothing starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sglang_mixed.cli.serve import Launch, placed
from sglang_mixed.errors import UnsupportedError

from ..engine.zygote import ROOT
from .jobs import command_line, run_python, with_scripts, words

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
