"""Kill one process of a server after another with SIGKILL; the server must end, and serve again on the same port.

    python scripts/reliability/kills.py [--requests 1000]

Each of the twenty rounds kills another process, of another layout, while the model is loaded or under traffic. Within
5 seconds HTTP must no longer answer 200, the whole tree must be gone and the port free; then a server on that port
serves the requests without an error.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import socket
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

import psutil
from common import MIX, MODEL, Traffic, alive, client, processes, record, send
from tests.engine.launch import Server, free_port, stop_all

BOUND = 5.0
TP, DP, EP = ("--tp-size", "2"), ("--dp-size", "2"), ("--tp-size", "2", "--ep-size", "2")


class Round(NamedTuple):
    """Which process dies (the nth in order of its start; "http" is the one that listens), when, and of what layout."""

    victim: int | str
    stage: str
    layout: tuple[str, ...] = ()


ROUNDS = [
    *(Round(victim, "traffic") for victim in (0, 1, "http", 0, 1)),
    *(Round(victim, "load") for victim in (0, "http", 0)),
    *(Round(victim, "traffic", TP) for victim in (0, 1, 2, "http")),
    *(Round(victim, "load", TP) for victim in (0, 1)),
    *(Round(victim, "traffic", EP) for victim in (0, 1)),
    Round(-1, "load", DP),
    *(Round(victim, "traffic", DP) for victim in (0, 2, 3)),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=len(ROUNDS))
    arguments = parser.parse_args()
    port, rounds, served, survived, slowest = free_port(), 0, 0, 0, 0.0
    try:
        with tempfile.TemporaryDirectory() as folder:
            for number, one in enumerate(ROUNDS[: arguments.rounds]):
                log = Path(folder) / f"{number}.log"
                seconds = kill(one, log, port)
                restarted = Server(log.with_suffix(".again"), *MODEL, *MIX, fresh=False, port=port).wait(600)
                traffic = asyncio.run(ask(restarted.url, arguments.requests))
                restarted.stop()
                good = seconds <= BOUND and not traffic.errors
                rounds = number + 1
                survived, served, slowest = survived + good, served + len(traffic.seconds), max(slowest, seconds)
                print(
                    f"{number + 1}: {one}: gone after {seconds:.2f} s, then {len(traffic.seconds)} served", flush=True
                )
                if not good:
                    print(f"  errors: {traffic.errors[:3]}\n{log.read_text()[-3000:]}", file=sys.stderr)
    finally:
        stop_all()
        record(
            "kills", rounds=rounds, survived=survived, slowest_seconds=round(min(slowest, 999), 2), served_after=served
        )
    return 0 if survived == rounds else 1


def kill(one: Round, log: Path, port: int) -> float:
    """Seconds from the kill until nothing is left of the server; infinite if HTTP answered 200 later than BOUND."""
    server = Server(log, *MODEL, *MIX, *one.layout, fresh=False, port=port)
    if one.stage == "load":
        tree = wait_for_ranks(server, one)
        return kill_one(server, one, tree)
    server.wait(600)
    return asyncio.run(kill_under_traffic(server, one))


def wait_for_ranks(server: Server, one: Round) -> list[psutil.Process]:
    """The processes as soon as the first of them loads weights."""
    needed = one.victim + 1 if isinstance(one.victim, int) else 1
    while True:
        tree = processes(server.job.pid)
        if "Load weight begin" in server.log.read_text() and len(tree) >= max(1, needed):
            return tree
        if server.job.poll() is not None:
            raise AssertionError(server.log.read_text())
        time.sleep(0.01)


async def kill_under_traffic(server: Server, one: Round) -> float:
    async with client() as session:
        generator, traffic = random.Random(0), Traffic()
        tasks = [asyncio.ensure_future(send(session, server.url, traffic, generator, 64)) for _ in range(32)]
        await asyncio.sleep(0.5)
        seconds = await asyncio.to_thread(kill_one, server, one, processes(server.job.pid))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return seconds


def kill_one(server: Server, one: Round, tree: list[psutil.Process]) -> float:
    pid = server.job.pid if one.victim == "http" else tree[int(one.victim)].pid
    os.kill(pid, signal.SIGKILL)
    started, answered = time.monotonic(), 0.0
    while alive(tree) or server.job.poll() is None or not is_free(server.url):
        if answers(server.url):
            answered = time.monotonic() - started
        if time.monotonic() - started > 60:
            return float("inf")
        time.sleep(0.05)
    server.job.kill()
    return float("inf") if answered > BOUND else time.monotonic() - started


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/model_info", timeout=0.5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def is_free(url: str) -> bool:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", int(url.rpartition(":")[2])))
        except OSError:
            return False
    return True


async def ask(url: str, count: int) -> Traffic:
    traffic, generator = Traffic(), random.Random(1)
    waiting = asyncio.Semaphore(16)

    async with client() as session:

        async def one() -> None:
            async with waiting:
                await send(session, url, traffic, generator)

        await asyncio.gather(*(one() for _ in range(count)))
    return traffic


if __name__ == "__main__":
    sys.exit(main())
