"""Requests at a fixed rate to a mix and, in the same run, to stock SGLang on its base: errors, hangs, p50 and p99.

    python scripts/reliability/load.py [--requests 10000] [--rate 12] [--soak MINUTES [--warm-up MINUTES]]

The tracker of experts is on. With --soak the memory of each process is read every minute, and that of all processes of
the mix may not grow by 1 % after the warm-up. It begins with requests side by side; then the cache of prefixes fills:
16384 tokens, of which a request leaves some 17, so that 3 requests a second need 5 minutes and a half.

Code that oneDNN makes for each shape of a 16-bit product stays small in a soak, on both servers: of the latest 1024
shapes, which are as many batch sizes as chance will bring, it would take 0.9 GB.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
from common import MIX, MODEL, Traffic, at_rate, client, record, send
from resident import Series
from tests.engine.launch import Server, http, stop_all

WARM_UP = 100
#: Read by torch and oneDNN at their first product: shapes whose code they keep.
FEW_SHAPES = {"LRU_CACHE_CAPACITY": "64", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
BURSTS, MOST_AT_ONCE = 40, 24


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--rate", type=float, default=12.0, help="Requests a second to each server.")
    parser.add_argument("--soak", type=float, default=0.0, metavar="MINUTES")
    parser.add_argument("--warm-up", type=int, default=10, metavar="MINUTES", help="Of the soak's; default 10.")
    arguments = parser.parse_args()
    if arguments.soak:
        os.environ |= FEW_SHAPES
    try:
        with tempfile.TemporaryDirectory() as folder:
            mixed = Server(Path(folder) / "mixed.log", *MODEL, *MIX, fresh=False)
            mixed.wait(600)
            stock = Server(Path(folder) / "stock.log", *MODEL, fresh=False)
            servers = {"mixed": mixed, "stock": stock.wait(600)}
            if arguments.soak:
                return asyncio.run(soak(servers, arguments.rate, 60 * arguments.soak, arguments.warm_up))
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


async def soak(servers: dict[str, Server], rate: float, seconds: float, warm_up: int) -> int:
    traffic = {name: Traffic() for name in servers}
    generators = {name: random.Random(3) for name in servers}
    series = {name: Series(server.job.pid) for name, server in servers.items()}
    at_once = random.Random(4)

    async with client() as session:

        async def ask(number: int) -> None:
            await asyncio.gather(
                *(send(session, server.url, traffic[name], generators[name], 4) for name, server in servers.items())
            )
            if number % 50 == 0:
                await scrape(session, servers["mixed"].url)

        for _ in range(BURSTS):
            await asyncio.gather(*(ask(1) for _ in range(at_once.randrange(1, MOST_AT_ONCE + 1))))
        watching = asyncio.ensure_future(watch(series))
        await at_rate(int(rate * seconds), rate, ask)
        watching.cancel()
    measured: dict[str, Any] = {}
    for name, one in traffic.items():
        print("\n".join(one.errors[:5]), file=sys.stderr)
        measured |= {
            f"{name}_served": len(one.seconds),
            f"{name}_errors": len(one.errors),
            f"{name}_mib": round(sum(series[name].end("rss").values())),
            f"{name}_growth_percent": round(100 * series[name].growth("rss", warm_up), 3),
            f"{name}_series": series[name].sizes,
        }
    record("soak", minutes=round(seconds / 60, 1), warm_up=warm_up, rate=rate, **measured)
    return 0 if measured["mixed_growth_percent"] < 1 and not traffic["mixed"].errors else 1


async def watch(series: dict[str, Series]) -> None:
    """Read all sizes once a minute, and print them."""
    while True:
        for name, one in series.items():
            one.read()
            print(time.strftime("%H:%M:%S"), name, one.latest(), file=sys.stderr, flush=True)
        await asyncio.sleep(60)


async def scrape(session: aiohttp.ClientSession, url: str) -> None:
    """As a dashboard does."""
    for path in ("/mixed_precision?modules=false", "/mixed_precision/experts"):
        async with session.get(f"{url}{path}") as response:
            await response.read()


if __name__ == "__main__":
    sys.exit(main())
