"""Real servers and engines, each a process with its log: forked from one zygote a session, or truly started."""

from __future__ import annotations

import functools
import json
import sys
import time
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import run_engine
from .ports import free_port, port_was_taken
from .zygote import Job, Zygote, start_fresh

TINY = Path(__file__).parents[2] / "examples" / "tiny"
# An idle scheduler would take a core from the engine beside it.
SMALL = {"mem_fraction_static": 0.2, "max_total_tokens": 16384, "sleep_on_idle": True}
FLAGS = ["--mem-fraction-static", "0.2", "--max-total-tokens", "16384", "--sleep-on-idle"]
RUN_COMMAND = "import os, sys; os.execv(sys.argv[1], sys.argv[1:])"
#: What a console script's command does.
RUN_SCRIPT = """\
import sys
from importlib.metadata import entry_points
(script,) = entry_points(group="console_scripts", name=sys.argv[1])
sys.argv = sys.argv[1:]
sys.exit(script.load()())
"""


def http(url: str, body: dict[str, Any] | None = None, timeout: float = 120) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout) as response:
        return json.loads(response.read() or "null")


@functools.cache
def zygote() -> Zygote:
    return Zygote()


class Server:
    """`sglang serve`, or another launcher: a true command, or forked from the zygote where that is not the point."""

    def __init__(
        self,
        log: Path,
        *arguments: str | Path,
        command: tuple[str, ...] = ("sglang", "serve"),
        fresh: bool = True,
        port: int | None = None,
    ) -> None:
        self.log, port = log, port or free_port()
        self.url = f"http://127.0.0.1:{port}"
        flags = [*command[1:], *map(str, arguments), "--port", str(port), *FLAGS]
        if "--dp-size" not in flags:
            flags += ["--nccl-port", str(free_port())]
        self._start = (
            partial(start_fresh, log, RUN_COMMAND, str(Path(sys.executable).parent / command[0]), *flags)
            if fresh
            else partial(zygote().start, log, RUN_SCRIPT, command[0], *flags, "--skip-server-warmup")
        )
        self.job = self._start()

    def wait(self, seconds: float = 300) -> Server:
        deadline, again = time.monotonic() + seconds, False
        while time.monotonic() < deadline:
            if (status := self.job.poll()) is not None:
                taken = not again and port_was_taken(self.log)
                assert taken, f"the server ended with {status}:\n{self.log.read_text()}"
                self.job.kill()
                self.job, again = self._start(), True
            try:
                http(f"{self.url}/model_info")
                return self
            except OSError:
                time.sleep(0.1)
        raise AssertionError(f"no answer after {seconds} s:\n{self.log.read_text()}")

    def generate(self, prompts: list[list[int]], **request: Any) -> list[dict[str, Any]]:
        answers: list[dict[str, Any]] = http(f"{self.url}/generate", {"input_ids": prompts, **request})
        return answers

    def stop(self) -> None:
        """Ends as an operator ends it, and makes sure of what that leaves."""
        self.job.terminate()
        try:
            self.job.wait(60)
        finally:
            self.job.kill()


class Engine:
    """`sgl.Engine` in a process of its own, answering the requests it was started with."""

    def __init__(self, log: Path, model: Path, *requests: dict[str, Any], **arguments: Any) -> None:
        self.log, asked, self.answered = log, log.with_suffix(".asked.json"), log.with_suffix(".answered.json")
        if arguments.get("dp_size", 1) == 1:
            arguments["nccl_port"] = free_port()
        asked.write_text(
            json.dumps({"arguments": {"model_path": str(model), **SMALL, **arguments}, "requests": requests})
        )
        # A context of an accelerator does not survive a fork.
        start = start_fresh if torch.accelerator.is_available() else zygote().start
        self._start = partial(start, log, run_engine.CODE, str(asked), str(self.answered))
        self.job = self._start()

    def result(self, seconds: float = 300) -> dict[str, Any]:
        """{"answers": one list per request, "memory": statistics of a mix}."""
        status = self._status(seconds)
        if status != 0 and port_was_taken(self.log):
            self.job = self._start()
            status = self._status(seconds)
        assert status == 0, f"the engine ended ({status}):\n{self.log.read_text()}"
        result: dict[str, Any] = json.loads(self.answered.read_text())
        return result

    def _status(self, seconds: float) -> int | str:
        try:
            return self.job.wait(seconds)
        except TimeoutError as error:
            return str(error)
        finally:
            self.job.kill()


def stop_all() -> None:
    """End everything that was started here and still runs."""
    for job in tuple(Job.alive):
        job.kill()
    if zygote.cache_info().currsize:
        zygote().stop()
        zygote.cache_clear()
