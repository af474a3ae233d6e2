"""Our routes under what no client should send, in numbers, and without a key; and a server whose rank is killed."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import signal
from collections.abc import Iterator
from typing import Any

import aiohttp
import psutil
import pytest

from .conftest import TINY, Server

KEY = {"Authorization": "Bearer the key"}
FLAGS = ("--model-path", TINY / "bf16", "--enable-mixed-precision", "--mixed-precision-config", TINY / "experts.yaml")
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE")
NASTY = (
    "",
    "-1",
    "0",
    "1",
    "1.5",
    "999999999999999999999",
    "NaN",
    "true",
    "null",
    "[]",
    "{}",
    "../../etc/passwd",
    "a\0b",
)
NASTY += ("%s%n", "é" * 50, "x" * 8000, "'; --", "<script>", "1e9", "٣", " 1", "0x10", "\ud7ff", "layer")
SECRETS = (b"examples/tiny", b"gptq_int4", b"experts.yaml", b"safetensors", b"model.layers")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("hostile") / "log", *FLAGS, "--api-key", "the key", fresh=False)

    async def wait() -> None:
        async with session(KEY) as client:
            while True:
                assert server.job.poll() is None, server.log.read_text()
                try:
                    async with client.get(f"{server.url}/model_info") as response:
                        assert response.status == 200
                        return
                except aiohttp.ClientConnectionError:
                    await asyncio.sleep(0.1)

    asyncio.run(wait())
    yield server
    server.job.kill()


def session(headers: dict[str, str]) -> aiohttp.ClientSession:
    timeout = aiohttp.ClientTimeout(total=300)
    return aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=0), timeout=timeout)


async def our_routes(client: aiohttp.ClientSession, url: str) -> dict[str, dict[str, Any]]:
    """Path -> method -> operation, as the server's own OpenAPI describes them."""
    async with client.get(f"{url}/openapi.json") as response:
        paths: dict[str, dict[str, Any]] = (await response.json())["paths"]
    return {path: methods for path, methods in paths.items() if path.startswith("/mixed_precision")}


async def generate(client: aiohttp.ClientSession, url: str) -> int:
    body = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 8, "ignore_eos": True}}
    async with client.post(f"{url}/generate", json=body) as response:
        return len((await response.json())["output_ids"])


def test_wrong_methods_and_malformed_parameters_are_refused_and_nothing_breaks(server: Server) -> None:
    async def attack() -> None:
        generator = random.Random(1)
        async with session(KEY) as client:
            routes = await our_routes(client, server.url)
            assert len(routes) >= 5
            for path, method in itertools.product(routes, METHODS):
                async with client.request(method, f"{server.url}{path}", data=b"\xff{" * 99) as response:
                    await response.read()
                    right = method.lower() in routes[path]
                    assert (response.status < 500) if right else (response.status in (404, 405)), (method, path)
            for path, operations in routes.items():
                for method, operation in operations.items():
                    names = [one["name"] for one in operation.get("parameters", [])] + ["unknown"]
                    for value in NASTY:
                        query = [(name, value) for name in names] + [(generator.choice(names), generator.choice(NASTY))]
                        async with client.request(method, f"{server.url}{path}", params=query) as response:
                            text = await response.text()
                            assert response.status in (200, 400, 414, 422), (response.status, path, query, text[:200])
            assert await generate(client, server.url) == 8

    asyncio.run(attack())


def test_without_the_key_nothing_is_told(server: Server) -> None:
    async def attack() -> None:
        async with session(KEY) as client:
            routes = await our_routes(client, server.url)
        for headers in (
            {},
            {"Authorization": "Bearer another"},
            {"Authorization": "the key"},
            {"X-API-Key": "the key"},
        ):
            async with session(headers) as client:
                for path, method in itertools.product((*routes, "/metrics", "/openapi.json"), ("GET", "POST")):
                    async with client.request(method, f"{server.url}{path}") as response:
                        body = await response.read() + json.dumps(dict(response.headers)).encode()
                    if not (path.endswith("/page") and method == "GET"):
                        assert response.status != 200, (headers, method, path)
                    assert not any(secret in body for secret in SECRETS), (method, path)

    asyncio.run(attack())


def test_a_thousand_scrapes_at_once_and_generation_goes_on(server: Server) -> None:
    async def attack() -> None:
        async with session(KEY) as client:
            paths = ("/mixed_precision?modules=false", "/mixed_precision/experts", "/mixed_precision")

            async def scrape(number: int) -> int:
                async with client.get(f"{server.url}{paths[number % len(paths)]}") as response:
                    await response.read()
                    return response.status

            scrapes = [asyncio.ensure_future(scrape(number)) for number in range(1000)]
            tokens = await asyncio.gather(*(generate(client, server.url) for _ in range(8)))
            assert tokens == [8] * 8
            assert set(await asyncio.gather(*scrapes)) == {200}

    asyncio.run(attack())


def test_a_server_ends_with_its_killed_scheduler_and_nothing_is_left_of_it(server: Server) -> None:
    tree = [one for one in psutil.Process(server.job.pid).children(recursive=True) if one.num_threads() > 1]
    os.kill(tree[0].pid, signal.SIGKILL)
    assert server.job.wait(120) != 0
    _, left = psutil.wait_procs(tree, timeout=60)
    assert [one for one in left if one.status() != psutil.STATUS_ZOMBIE] == []
