"""Requests at a fixed rate to a mix and, in the same run, to stock SGLang on its base: errors, hangs, p50 and p99.

    python scripts/reliability/load.py [--requests 10000] [--rate 12] [--soak MINUTES]

The tracker of experts is on. With --soak the mix alone is asked for so long, and the memory of all its processes may
not grow by 1 % after the first tenth of that time.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from pathlib import Path

import aiohttp
import psutil
from common import MIX, MODEL, Traffic, at_rate, client, processes, record, send
from tests.engine.launch import Server, http, stop_all

WARM_UP = 100


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--rate", type=float, default=12.0, help="Requests a second to each server.")
    parser.add_argument("--soak", type=float, default=0.0, metavar="MINUTES")
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            mixed = Server(Path(folder) / "mixed.log", *MODEL, *MIX, fresh=False)
            if arguments.soak:
                return asyncio.run(soak(mixed.wait(600), arguments.rate, 60 * arguments.soak))
            stock = Server(Path(folder) / "stock.log", *MODEL, fresh=False)
            servers = {"mixed": mixed.wait(600), "stock": stock.wait(600)}
            return asyncio.run(load(servers, arguments.requests, arguments.rate))
    finally:
        stop_all()


async def load(servers: dict[str, Server], requests: int, rate: float) -> int:
    traffic = {name: Traffic() for name in servers}
    generators = {name: random.Random(1) for name in servers}

    async with client() as session:
        for name, server in servers.items():
            for _ in range(WARM_UP):
                await send(session, server.url, Traffic(), random.Random(2))
            traffic[name] = Traffic()

        async def ask(_: int) -> None:
            await asyncio.gather(
                *(send(session, server.url, traffic[name], generators[name], 2) for name, server in servers.items())
            )

        started = time.monotonic()
        await at_rate(requests, rate, ask)
        seconds = time.monotonic() - started
    tracking = http(f"{servers['mixed'].url}/mixed_precision/experts")
    measured = {
        f"{name}_{what}": value
        for name, one in traffic.items()
        for what, value in {
            "served": len(one.seconds),
            "errors": len(one.errors),
            "p50_ms": round(one.percentile(0.5), 1),
            "p99_ms": round(one.percentile(0.99), 1),
        }.items()
    }
    for one in traffic.values():
        print("\n".join(one.errors[:5]), file=sys.stderr)
    record("load", requests=requests, rate=rate, seconds=round(seconds), tracking=bool(tracking["prefill"]), **measured)
    return 0 if not any(one.errors for one in traffic.values()) else 1


async def soak(server: Server, rate: float, seconds: float) -> int:
    traffic, generator = Traffic(), random.Random(3)
    tree = [psutil.Process(server.job.pid), *processes(server.job.pid)]
    sizes: list[int] = []

    async with client() as session:

        async def ask(number: int) -> None:
            await send(session, server.url, traffic, generator, 4)
            if number % 50 == 0:
                await scrape(session, server.url)
                sizes.append(sum(process.memory_info().rss for process in tree))

        await at_rate(int(rate * seconds), rate, ask)
    tenth = max(1, len(sizes) // 10)
    begin, end = (sum(part) / len(part) for part in (sizes[tenth : 2 * tenth], sizes[-tenth:]))
    growth = (end - begin) / begin
    print("\n".join(traffic.errors[:5]), file=sys.stderr)
    record(
        "soak",
        minutes=round(seconds / 60, 1),
        rate=rate,
        served=len(traffic.seconds),
        errors=len(traffic.errors),
        growth_percent=round(100 * growth, 3),
        mib=round(end / 2**20),
        p50_ms=round(traffic.percentile(0.5), 1),
        p99_ms=round(traffic.percentile(0.99), 1),
    )
    return 0 if growth < 0.01 and not traffic.errors else 1


async def scrape(session: aiohttp.ClientSession, url: str) -> None:
    """As a dashboard does."""
    for path in ("/mixed_precision?modules=false", "/mixed_precision/experts"):
        async with session.get(f"{url}{path}") as response:
            await response.read()


if __name__ == "__main__":
    sys.exit(main())
