"""The page in a real browser, and `sglang-mixed experts`, on a real server."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import shutil
import threading
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page, Route, expect, sync_playwright
from typer.testing import CliRunner

from sglang_mixed.cli.main import app
from sglang_mixed.experts import ExpertFormats, read_export, report
from sglang_mixed.experts.balance import gini, top_share
from sglang_mixed.experts.colors import HUES, ramp
from tests.experts.synthetic import counts

from .conftest import TINY, Server
from .conftest import http as get

MAP = TINY / "experts.yaml"
FLAGS = ["--model-path", TINY / "bf16", "--enable-mixed-precision", "--mixed-precision-config", MAP]
KEY = "sesame"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that wants a key and counts nothing; it starts while the other one is tested."""
    log = tmp_path_factory.mktemp("guarded") / "log"
    server = Server(log, *FLAGS, "--api-key", KEY, "--disable-expert-tracking", fresh=False)
    yield server
    server.job.kill()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, prompts: list[list[int]], guarded: Server) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server") / "log", *FLAGS, fresh=False).wait()
    server.generate(prompts[:4], sampling_params={"max_new_tokens": 8, "temperature": 0, "ignore_eos": True})
    yield server
    server.job.kill()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("no Chromium on this machine: apt install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture
def expected() -> list[str]:
    """How console lines end that a page may write: the browser's own, of answers that the page then tells about."""
    return ["401 (Unauthorized)", "ERR_INTERNET_DISCONNECTED", "ERR_CONNECTION_REFUSED"]


@pytest.fixture
def context(browser: Browser, request: pytest.FixtureRequest, expected: list[str]) -> Iterator[BrowserContext]:
    """Fails a test whose page writes to the console, throws, or asks another host for anything."""
    context = browser.new_context(**getattr(request, "param", {}))
    said: list[str] = []
    context.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    context.on("weberror", lambda error: said.append(str(error.error)))
    hosts: set[str] = set()
    context.on("request", lambda asked: hosts.add(asked.url.split("/")[2] if asked.url.startswith("http") else ""))
    yield context
    context.close()
    assert [line for line in said if not line.endswith(tuple(expected))] == []
    assert all(host.startswith("127.0.0.1:") or not host for host in hosts)


@pytest.fixture
def page(context: BrowserContext, server: Server) -> Page:
    return opened(context, server)


def opened(context: BrowserContext, server: Server) -> Page:
    page = context.new_page()
    page.goto(f"{server.url}/mixed_precision/page")
    expect(page.locator("#status")).to_have_text("live")
    return page


def drawn_cells(page: Page) -> list[list[Any]]:
    """The color, 0 to 1, of each cell of the heat map, read below its letter."""
    image = np.asarray(Image.open(io.BytesIO(page.locator("#heat").screenshot())).convert("RGB")) / 255
    size = page.evaluate("map.metrics")
    rows = len(page.evaluate("map.layers"))
    return [
        [
            image[18 + int((row + 0.7) * size["height"]), int((expert + 0.5) * size["cell"])]
            for expert in range(size["experts"])
        ]
        for row in range(rows)
    ]


def tokens(page: Page) -> int:
    return int(page.locator("#tiles dd").first.inner_text().split()[0].replace(",", ""))


def run(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["experts", *map(str, arguments)])
    return result.exit_code, result.output


def test_the_page_shows_what_the_server_counts_holds_and_was_told(page: Page, server: Server) -> None:
    counted = get(f"{server.url}/mixed_precision/experts")
    total = np.array(counted["prefill"]) + np.array(counted["decode"])
    assert tokens(page) == total[0].sum() / counted["top_k"] > 0
    assert page.locator("#formats button").all_inner_texts() == [
        f"{letter}\n{label}" for letter, label in zip("ABC", counted["formats"]["labels"], strict=True)
    ]
    page.locator("#heat").focus()
    for key in ("ArrowDown", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
    details = page.locator("#details").inner_text()
    assert details.startswith("Layer 1, expert 2") and f"{total[1, 2]:,} tokens" in details and "FP8 128x128" in details
    drawn = [float(one.get_attribute("data-value") or "nan") for one in page.locator("#balance [data-value]").all()]
    assert drawn == pytest.approx([*gini(total), *top_share(total)])
    held = get(f"{server.url}/mixed_precision?modules=false")
    assert page.locator("#by-format .bar").count() == len(held["by_format"])
    assert page.locator("#by-kind .label").all_inner_texts()[0] == "experts"
    for rule in counted["map"]["rules"]:
        assert f'"{rule["pattern"]}": {rule["source"]}' in page.locator("#map").inner_text()


def test_cells_have_the_hue_of_their_format_and_a_pressed_format_stands_alone(page: Page, server: Server) -> None:
    cells = get(f"{server.url}/mixed_precision/experts")["formats"]["cells"]
    for formats, colors in zip(cells, drawn_cells(page), strict=True):
        for format, color in zip(formats, colors, strict=True):
            assert np.abs(ramp(format) - color).max(axis=1).min() < 0.01
    page.locator("#formats button").nth(2).click()
    assert page.locator("#formats [aria-pressed=true]").inner_text().startswith("C")
    for formats, colors in zip(cells, drawn_cells(page), strict=True):
        assert [np.min(color) < 0.8 for color in colors] == [format == 2 for format in formats]


def test_ramps_of_the_page_are_those_of_the_pictures(page: Page) -> None:
    for dark in (False, True):
        for format in range(-1, len(HUES)):
            found = page.evaluate("([format, dark]) => ramp(format, dark)", [format, dark])
            expected = [
                f"rgb({' '.join(map(str, color))})" for color in np.floor(ramp(format, dark) * 255 + 0.5).astype(int)
            ]
            assert found == expected


def test_the_page_follows_requests_while_they_run(page: Page, server: Server, prompts: list[list[int]]) -> None:
    before = tokens(page)
    server.generate(prompts[8:10], sampling_params={"max_new_tokens": 8, "temperature": 0, "ignore_eos": True})
    expect(page.locator("#tiles dd").first).not_to_contain_text(f"{before:,}")
    assert tokens(page) > before
    page.get_by_text("decode", exact=True).click()
    decoded = page.locator("#top tbody tr").count()
    page.get_by_text("last minute", exact=True).click()
    assert decoded and page.locator("#top tbody tr").count()


def test_counts_that_begin_again_and_a_server_that_is_away_are_told(context: BrowserContext, server: Server) -> None:
    page = opened(context, server)
    context.set_offline(True)
    page.evaluate("refresh()")
    expect(page.locator("#notice")).to_contain_text("does not answer")
    assert page.locator("body").get_attribute("data-stale") is not None and tokens(page) > 0
    context.set_offline(False)
    page.evaluate("refresh()")
    expect(page.locator("#status")).to_have_text("live")
    expect(page.locator("#notice")).to_be_hidden()
    assert run(server.url, "--reset")[0] == 0
    page.evaluate("refresh()")
    expect(page.locator("#notice")).to_contain_text("Counting began again")
    server.generate([[5, 6, 7]], sampling_params={"max_new_tokens": 8, "temperature": 0, "ignore_eos": True})


@pytest.mark.parametrize(
    "context",
    [
        {"color_scheme": "light", "viewport": {"width": 375, "height": 700}},
        {"color_scheme": "dark", "viewport": {"width": 375, "height": 700}},
    ],
    indirect=True,
    ids=["light", "dark"],
)
def test_light_and_dark_fit_a_phone_and_the_choice_is_kept(context: BrowserContext, server: Server) -> None:
    page = opened(context, server)
    brightness = "parseInt(getComputedStyle(document.body).backgroundColor.slice(4))"
    first = page.evaluate(brightness)
    assert (first < 64) == page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert page.evaluate("document.documentElement.scrollWidth") == 375
    page.locator("#theme").click()
    second = page.evaluate(brightness)
    assert (first < 64) != (second < 64)
    page.reload()
    expect(page.locator("#status")).to_have_text("live")
    assert page.evaluate(brightness) == second


def test_downloads_are_the_export_a_table_and_a_picture(page: Page, server: Server, tmp_path: Path) -> None:
    for kind in ("json", "csv", "png"):
        with page.expect_download() as download:
            page.locator(f"[data-download={kind}]").click()
        download.value.save_as(tmp_path / f"page.{kind}")
    code, _ = run(server.url, "--export", tmp_path / "run.json", "--csv", tmp_path / "run.csv")
    assert code == 0
    downloaded, exported = read_export(tmp_path / "page.json"), read_export(tmp_path / "run.json")
    assert downloaded.experts == exported.experts and downloaded.formats is not None
    table, written = ((tmp_path / f"{name}.csv").read_text().splitlines() for name in ("page", "run"))
    assert [line.split(",")[:7] for line in table] == [line.split(",")[:7] for line in written]
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("context", [{"viewport": {"width": 375, "height": 700}}], indirect=True, ids=["phone"])
@pytest.mark.parametrize(("layers", "experts"), [(94, 128), (61, 256)])
def test_a_stand_in_for_a_large_model_is_drawn_whole(
    context: BrowserContext, server: Server, layers: int, experts: int
) -> None:
    one = counts(layers=tuple(range(3, 3 + layers)), experts=experts, top_k=8, tokens=50)
    labels = "FP8 128x128", "GPTQ int4 g32 + GPTQ int4 g64 asym act-order + CT int4 g32 asym"
    formats = ExpertFormats(labels, np.arange(layers * experts).reshape(layers, experts) % 2)
    answer = json.dumps(report(one, formats))

    def stand_in(route: Route) -> None:
        route.fulfill(body=answer, content_type="application/json")

    context.route("**/mixed_precision/experts", stand_in)
    page = opened(context, server)
    page.evaluate("([layer, expert]) => map.select(layer, expert)", [layers - 1, experts - 1])
    last = f"Layer {2 + layers}, expert {experts - 1}"
    expect(page.locator("#details")).to_contain_text(f"{last}{labels[1]} · {one.total[-1, -1]:,} tokens")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate("map.metrics.cell * map.matrix[0].length") >= 6 * experts


def test_a_key_is_asked_for_and_kept_in_the_tab_only(context: BrowserContext, guarded: Server) -> None:
    wait_for(guarded)
    page = context.new_page()
    page.goto(f"{guarded.url}/mixed_precision/page")
    for key in ("wrong", KEY):
        expect(page.locator("dialog")).to_be_visible()
        page.locator("#key-value").fill(key)
        page.locator("dialog button").click()
    expect(page.locator("#notice")).to_contain_text("--disable-expert-tracking")
    expect(page.locator("#memory-text")).to_contain_text("instead of")
    expect(page.locator("#heat")).to_be_hidden()
    assert page.evaluate("Object.values(localStorage).length") == 0 == len(context.cookies())


def test_the_command_reads_and_resets_a_server_and_what_it_clears_is_not_lost(server: Server, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    code, output = run(server.url, "--png", out, "--json")
    shown: dict[str, Any] = json.loads(output)
    assert code == 0 and shown["tokens"] > 0 and out.read_bytes().startswith(b"\x89PNG")
    assert shown["top_experts"][0]["format"] in {"FP8 128x128", "GPTQ int4 g128", "INT8 channel"}
    code, output = run(server.url, "--reset", "--json")
    assert code == 0 and json.loads(output)["activations"] == shown["activations"]
    assert json.loads(run(server.url, "--json")[1])["activations"] == 0
    server.generate([[5, 6, 7]], sampling_params={"max_new_tokens": 4, "temperature": 0, "ignore_eos": True})


def test_a_server_that_wants_a_key_or_counts_nothing_says_so(guarded: Server) -> None:
    wait_for(guarded)
    code, output = run(guarded.url)
    assert code == 1 and "--api-key" in output
    code, output = run(guarded.url, "--api-key", KEY)
    assert code == 1 and "--disable-expert-tracking" in output
    code, output = run(guarded.url + "/nowhere", "--api-key", KEY)
    assert code == 1 and "HTTP 404" in output


def test_a_server_that_is_asked_all_the_time_ends_when_it_is_told_to(
    context: BrowserContext, guarded: Server, expected: list[str]
) -> None:
    wait_for(guarded)
    # Its ranks may end before its HTTP server does, and that may end in the middle of an answer.
    expected += ["503 (Service Unavailable)", "ERR_CONNECTION_RESET", "ERR_EMPTY_RESPONSE"]
    context.add_init_script(f"if (location.host) sessionStorage.setItem('sglang-mixed-api-key', {KEY!r})")
    page = opened(context, guarded)

    def ask() -> None:
        connection = http.client.HTTPConnection(guarded.url.removeprefix("http://"), timeout=60)
        with contextlib.suppress(OSError, http.client.HTTPException):
            while True:
                connection.request("GET", "/mixed_precision/experts", headers={"Authorization": f"Bearer {KEY}"})
                connection.getresponse().read()

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    guarded.job.terminate()
    guarded.job.wait(60)
    for thread in threads:
        thread.join()
    page.evaluate("refresh()")
    expect(page.locator("#notice")).to_contain_text("does not answer")


def wait_for(server: Server) -> None:
    """`Server.wait` where every answer needs a key."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert server.job.poll() is None, server.log.read_text()
        try:
            get(f"{server.url}/model_info")
        except urllib.error.HTTPError as error:
            error.close()
            assert error.code == 401
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"no answer:\n{server.log.read_text()}")
