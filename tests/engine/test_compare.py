"""`compare` on two real servers: stock BF16, and a mix."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sglang_mixed.cli.main import app
from sglang_mixed.plan import make_plan

from .conftest import TINY, Server


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    folder, base = tmp_path_factory.mktemp("compare"), ("--model-path", TINY / "bf16")
    mix = ("--enable-mixed-precision", "--mixed-precision-config", TINY / "int4.yaml")
    servers = [Server(folder / "bf16.log", *base, fresh=False), Server(folder / "int4.log", *base, *mix, fresh=False)]
    yield [server.wait().url for server in servers]
    for server in servers:
        server.job.kill()


def test_a_mix_is_told_from_what_it_was_made_of(urls: list[str], tmp_path: Path) -> None:
    picture = tmp_path / "compare.png"
    arguments = ["compare", *urls, "--text", str(TINY / "heldout.txt"), "--tokens", "512", "--window", "128"]
    result = CliRunner().invoke(app, [*arguments, "--json", "--png", str(picture)])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["predictions"] == 4 * 127 and found["interleaved"]
    assert 0.0005 < found["divergence"]["low"] <= found["divergence"]["value"] <= found["divergence"]["high"] < 0.1
    assert found["divergence_p99"]["value"] > found["divergence"]["value"]
    assert 0.8 < found["top_1_agreement"]["value"] < 1
    assert all(5 < one["low"] < one["value"] < one["high"] < 100 for one in found["perplexity"])
    assert found["weight_bytes"] == [None, make_plan(TINY / "int4.yaml").weight_bytes()]
    assert all(one["low"] > 0 for one in found["tokens_per_second"])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_an_address_without_a_server_is_one_message() -> None:
    arguments = ["compare", "http://127.0.0.1:9", "http://127.0.0.1:9", "--text", str(TINY / "heldout.txt")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1 and "no server answers" in result.output
