"""`sglang-mixed serve`: SGLang's server, with short flags, errors before anything loads, and a test of itself."""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import shlex
import signal
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..client import authorization, every_rank
from ..config import load_map
from ..errors import EngineError, MissingFileError, UnsupportedError
from ..preflight import available_devices, check_address, check_devices
from .nodes import Place, place_of
from .proof import fetch_proof

HOST, PORT = "127.0.0.1", 30000
QUESTION = "The capital of France is"


@dataclass(frozen=True, slots=True)
class Launch:
    """One process of a server. `flags` are SGLang's own, as given; what is None is left to SGLang, or to the map."""

    model: str
    map: Path | None = None
    tp: int | None = None
    dp: int | None = None
    ep: int | None = None
    host: str | None = None
    port: int | None = None
    nnodes: int | None = None
    node_rank: int | None = None
    dist_init_addr: str | None = None
    flags: tuple[str, ...] = ()

    @property
    def arguments(self) -> list[str]:
        """SGLang's command line. On one node nothing has to meet, and copies of the model must not: no address."""
        options = {
            "--model-path": self.model,
            "--tp-size": self.tp,
            "--dp-size": self.dp,
            "--ep-size": self.ep,
            "--host": self.host,
            "--port": self.port,
            "--nnodes": self.nnodes,
            "--node-rank": self.node_rank,
            "--dist-init-addr": self.dist_init_addr if (self.nnodes or 1) > 1 else None,
        }
        found = [str(part) for flag, value in options.items() if value is not None for part in (flag, value)]
        if self.map is not None:
            found += ["--enable-mixed-precision", "--mixed-precision-config", str(self.map)]
        return [*found, *self.flags]

    @property
    def url(self) -> str:
        """Where the server answers this host."""
        host, port = self.address
        reachable = {"0.0.0.0": HOST, "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
        return f"http://{reachable}:{port}"

    @property
    def api_key(self) -> str | None:
        """The server's key, if SGLang's flags give one."""
        given = [value for flag, value in pairwise(self.flags) if flag == "--api-key"]
        given += [flag.partition("=")[2] for flag in self.flags if flag.startswith("--api-key=")]
        return given[-1] if given else None

    def check(self) -> None:
        """Raise what can be known before SGLang is imported: of map, model, accelerators and address."""
        address = self.address  # reads the map
        check_model(self.model)
        check_address(*address)
        if "cpu" not in self.flags:
            check_devices(self.tp or 1, self.dp or 1, self.nnodes or 1, available_devices())

    @property
    def address(self) -> tuple[str, int]:
        """Host and port: as given, else the map's, else SGLang's own."""
        said = load_map(self.map).server if self.map is not None else None
        return self.host or (said and said.host) or HOST, self.port or (said and said.port) or PORT


def parse_address(text: str) -> tuple[str, int | None]:
    """HOST:PORT, HOST, :PORT or [IPv6]:PORT. Raises UnsupportedError for anything else."""
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        host, port = text, ""
    if port and not (port.isdecimal() and 0 < int(port) < 65536):
        raise UnsupportedError(f"not an address: {text}", rule="HOST:PORT, with a port of 1 to 65535")
    return host.strip("[]") or HOST, int(port) if port else None


def placed(launch: Launch, rank: int, ranks_per_node: int | None, world_size: int | None) -> Launch:
    """The launch of one process among several that are started one by one, the one whose first rank is `rank`.

    Each has a port of its own, and GPUs of its own where fewer ranks than the host's GPUs are asked for.
    Raises ParallelismError (see `place_of`), UnsupportedError where they do not know where to meet.
    """
    tp, dp, devices = launch.tp or 1, launch.dp or 1, available_devices()
    place = place_of(tp, dp, rank, ranks_per_node or devices or tp * dp, world_size)
    launch = replace(launch, dp=place.dp, port=launch.address[1] + rank)
    if devices and ranks_per_node and ranks_per_node < devices:
        launch = replace(launch, flags=("--base-gpu-id", str(rank % devices), *launch.flags))
    if place.copies > 1 and place.node == 0:
        _tell_of_copies(launch, place, rank, tp * dp // place.copies)
    if place.nodes == 1:
        return launch
    if launch.dist_init_addr is None:
        raise UnsupportedError(
            f"{place.nodes} processes make one server, and do not know where to meet",
            rule="the first one's address is given to all of them",
            remedy="add --dist-init-addr HOST:PORT",
        )
    host, port = parse_address(launch.dist_init_addr)
    # Copies of the model that share a host must not meet at one address.
    meeting = f"{host}:{(port or 0) + place.copy}"
    return replace(launch, nnodes=place.nodes, node_rank=place.node, dist_init_addr=meeting)


def _tell_of_copies(launch: Launch, place: Place, rank: int, ranks: int) -> None:
    """What a copy of so many ranks is, and how all copies get one address."""
    first = launch.address[1] - rank
    urls = " ".join(replace(launch, port=first + copy * ranks).url for copy in range(place.copies))
    print(
        f"copy {place.copy + 1} of {place.copies} of the model is a server of its own: {launch.url}",
        f"one address for all on this host: python -m sglang_router.launch_router --worker-urls {urls}",
        sep="\n",
        file=sys.stderr,
    )


def check_model(model: str) -> None:
    """Raise MissingFileError for a path that is not there; a name on the hub is left to SGLang."""
    is_name = model.count("/") == 1 and not model.startswith((".", "/", "~"))
    if is_name or Path(model).expanduser().exists():
        return
    raise MissingFileError(
        f"model path does not exist: {model}",
        file=Path(model).absolute(),
        rule="the model is a checkpoint folder, or a name on the hub",
        remedy="correct --model-path",
    )


def serve(arguments: Sequence[str]) -> None:
    """Run SGLang's server in this process."""
    sys.argv = ["sglang.launch_server", *arguments]
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)


def _serve_apart(arguments: Sequence[str]) -> None:
    os.setsid()
    serve(arguments)


@contextmanager
def running(launch: Launch, seconds: float) -> Iterator[None]:
    """The server in a process of its own, while the block runs. Raises EngineError if it does not come up."""
    server = multiprocessing.get_context("spawn").Process(target=_serve_apart, args=(launch.arguments,))
    server.start()
    try:
        _wait_until_up(launch, server, seconds)
        yield
    finally:
        assert server.pid is not None
        server.terminate()
        server.join(60)
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.join()


def _wait_until_up(launch: Launch, server: Any, seconds: float) -> None:
    url, deadline = launch.url, time.monotonic() + seconds
    request = urllib.request.Request(f"{url}/model_info", headers=authorization(launch.api_key))
    while server.is_alive():
        with suppress(OSError):
            urllib.request.urlopen(request, timeout=5).close()
            return
        if time.monotonic() > deadline:
            raise EngineError(f"no answer after {seconds:.0f} s", file=url, remedy="see the output above")
        time.sleep(0.2)
    raise EngineError(f"the server ended with {server.exitcode}", file=url, remedy="see the output above")


def test(launch: Launch, seconds: float = 1800) -> dict[str, Any]:
    """Start the server, ask one question, check the proof of every rank, stop: `answer`, and `verified` modules.

    Raises EngineError where the server does not start or answer, ProofError where memory differs from the files.
    """
    with running(launch, seconds):
        body = {"text": QUESTION, "sampling_params": {"max_new_tokens": 16, "temperature": 0}}
        headers = {"Content-Type": "application/json", **authorization(launch.api_key)}
        request = urllib.request.Request(f"{launch.url}/generate", json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=600) as response:
                answer = json.load(response)["text"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EngineError(f"the question was not answered: {error}", file=launch.url) from error
        report: dict[str, Any] = {"question": QUESTION, "answer": answer}
        if launch.map is not None:
            ranks = every_rank(fetch_proof(launch.url, api_key=launch.api_key))
            report["ranks"] = len(ranks)
            report["verified"] = sum(rank["verification"]["verified"] for rank in ranks)
        return report


def run(launch: Launch, *, ask: bool, dry_run: bool) -> None:
    """What `sglang-mixed serve` does, once its flags are read."""
    if dry_run:
        print(shlex.join(["python", "-m", "sglang.launch_server", *launch.arguments]))
        return
    launch.check()
    if not ask or launch.node_rank:  # the first node asks
        serve(launch.arguments)
        return
    report = test(launch)
    print(f"{report['question']}{report['answer']}")
    if "verified" in report:
        print(f"{report['ranks']} ranks: {report['verified']} modules in memory have the SHA-256 of their files")
