"""Real servers and engines on the CPU, shared by the tests: starting one takes half a minute."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

TINY = Path(__file__).parents[2] / "examples" / "tiny"
SMALL = {"mem_fraction_static": 0.2, "max_total_tokens": 16384}
FLAGS = ["--mem-fraction-static", "0.2", "--max-total-tokens", "16384"]


def http(url: str, body: dict[str, Any] | None = None, timeout: float = 120) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout) as response:
        return json.loads(response.read() or "null")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Server:
    """`sglang serve` (or another launcher) as a subprocess."""

    def __init__(self, log: Path, *arguments: str | Path, command: tuple[str, ...] = ("sglang", "serve")) -> None:
        self.log, port = log, free_port()
        self.url = f"http://127.0.0.1:{port}"
        program = [str(Path(sys.executable).parent / command[0]), *command[1:]]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*program, *map(str, arguments), "--port", str(port), *FLAGS], stdout=output, stderr=output
            )

    def wait(self, seconds: float = 300) -> Server:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended with {self.process.returncode}:\n{self.log.read_text()}")
            try:
                http(f"{self.url}/model_info")
                return self
            except OSError:
                time.sleep(0.5)
        raise AssertionError(f"no answer after {seconds} s:\n{self.log.read_text()}")

    def generate(self, prompts: list[list[int]], **request: Any) -> list[dict[str, Any]]:
        answers: list[dict[str, Any]] = http(f"{self.url}/generate", {"input_ids": prompts, **request})
        return answers

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)


class Engine:
    """`sgl.Engine` in a process of its own, answering the requests it was started with."""

    def __init__(self, log: Path, model: Path, *requests: dict[str, Any], **arguments: Any) -> None:
        self.log = log
        job = {"arguments": {"model_path": str(model), **SMALL, **arguments}, "requests": requests}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.engine.run_engine"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("wb"),
            text=True,
            cwd=Path(__file__).parents[2],
        )
        assert self.process.stdin
        self.process.stdin.write(json.dumps(job))
        self.process.stdin.close()

    def result(self) -> dict[str, Any]:
        """{"answers": one list per request, "memory": statistics of a mix}."""
        assert self.process.stdout
        output = self.process.stdout.read()
        assert self.process.wait() == 0, f"the engine ended:\n{self.log.read_text()}"
        result: dict[str, Any] = json.loads(output.splitlines()[-1])
        return result


def held_out_prompts() -> list[list[int]]:
    """20 prompts of held-out text, 16 to 130 tokens."""
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(TINY / "bf16" / "tokenizer.json")).encode((TINY / "heldout.txt").read_text()).ids
    return [ids[200 * index : 200 * index + 16 + 6 * index] for index in range(20)]


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    return held_out_prompts()
