"""A served mix, its processes, traffic at a fixed rate, and the file that keeps what the runs found."""

from __future__ import annotations

import asyncio
import json
import platform
import random
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp
import psutil

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.engine.launch import TINY  # noqa: E402

RESULTS = ROOT / "docs" / "reliability.jsonl"
MIX = ("--enable-mixed-precision", "--mixed-precision-config", TINY / "experts.yaml")
MODEL = ("--model-path", TINY / "bf16")


def record(what: str, **found: Any) -> None:
    """Print one JSON object and append it to the results, from which report.py makes docs/reliability.md."""
    line = {
        "what": what,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "sglang": version("sglang"),
        "torch": version("torch"),
        **found,
    }
    print(json.dumps(line), flush=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(line) + "\n")


def processes(pid: int) -> list[psutil.Process]:
    """The server's own processes from the top: SGLang's have several threads, and what only stands by has one."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        try:
            if process.num_threads() > 1:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def alive(tree: list[psutil.Process]) -> list[int]:
    """Which of them still run."""
    found = []
    for process in tree:
        try:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except psutil.NoSuchProcess:
            continue
    return found


@dataclass
class Traffic:
    """What came of the requests: seconds of each that was answered, and the first words of each error."""

    seconds: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def percentile(self, share: float) -> float:
        """Milliseconds."""
        ordered = sorted(self.seconds)
        return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def send(
    session: aiohttp.ClientSession, url: str, traffic: Traffic, generator: random.Random, tokens: int = 4
) -> None:
    """One request of random text; its answer must have all its tokens."""
    prompt = [generator.randrange(1, 200) for _ in range(generator.randrange(4, 24))]
    body = {"input_ids": prompt, "sampling_params": {"max_new_tokens": tokens, "ignore_eos": True, "temperature": 0}}
    started = time.perf_counter()
    try:
        async with session.post(f"{url}/generate", json=body) as response:
            answer = await response.json()
            if response.status != 200 or len(answer["output_ids"]) != tokens:
                raise ValueError(f"{response.status}: {answer!r:.200}")
    except Exception as error:
        traffic.errors.append(f"{type(error).__name__}: {error}"[:200])
    else:
        traffic.seconds.append(time.perf_counter() - started)


async def at_rate(count: int, rate: float, ask: Callable[[int], Awaitable[None]]) -> None:
    """`count` calls, begun at a fixed rate a second whatever becomes of the ones before."""
    started = time.perf_counter()
    tasks = []
    for number in range(count):
        await asyncio.sleep(max(0.0, started + number / rate - time.perf_counter()))
        tasks.append(asyncio.ensure_future(ask(number)))
    await asyncio.gather(*tasks)


def client() -> aiohttp.ClientSession:
    """A session without a bound on connections; a request that takes two minutes counts as hung."""
    # The server closes a connection that was idle for 5 seconds, if need be while a request is on its way.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=120))
