"""Our metrics on SGLang's own `/metrics`: they parse, say what the server holds and counted, and are few."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from .conftest import TINY, Server, free_port, http

MAP = TINY / "experts.yaml"
EXAMPLES = TINY.parent
FLAGS = ("--model-path", TINY / "bf16", "--enable-mixed-precision", "--mixed-precision-config", MAP, "--enable-metrics")
#: What each of our labels can be on this model: 2 layers of 8 experts on one rank.
VALUES = {
    "format": {"BF16", "FP8 128x128", "FP8 channel", "GPTQ int4 g128", "INT8 channel"},
    "kind": {"attention", "embedding", "experts", "lm_head", "norm", "router"},
    "dp_rank": {"0"},
    "tp_rank": {"0"},
    "layer": {"0", "1"},
    "phase": {"prefill", "decode"},
    "expert": set("01234567"),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, prompts: list[list[int]]) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server") / "log", *FLAGS, fresh=False)
    server.wait().generate(prompts[:4], sampling_params={"max_new_tokens": 4, "temperature": 0, "ignore_eos": True})
    yield server
    server.job.kill()


def scrape(server: Server) -> str:
    with urllib.request.urlopen(f"{server.url}/metrics") as response:
        text: str = response.read().decode()
    return text


def ours(text: str) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(text) if "sglang_mixed" in family.name}


@pytest.fixture(scope="module")
def metrics(server: Server) -> Mapping[str, Metric]:
    return ours(scrape(server))


def test_they_stand_beside_sglangs_own(server: Server) -> None:
    assert any(family.name.startswith("sglang:") for family in text_string_to_metric_families(scrape(server)))


def test_weights_are_those_of_the_report_by_format_and_kind(server: Server, metrics: Mapping[str, Metric]) -> None:
    report = http(f"{server.url}/mixed_precision?modules=false")
    for metric, field in (("weight_bytes", "bytes"), ("weight_16_bit_bytes", "bf16_bytes")):
        samples = metrics[f"sglang_mixed_{metric}"].samples
        for label, division in (("format", "by_format"), ("kind", "by_module_kind")):
            sums: dict[str, float] = {}
            for one in samples:
                sums[one.labels[label]] = sums.get(one.labels[label], 0) + one.value
            assert sums == {name: totals[field] for name, totals in report[division].items()}
    for metric, field in (
        ("compression_ratio", "compression_ratio"),
        ("load_seconds", "load_seconds"),
        ("load_read_bytes", "bytes_read"),
    ):
        assert [one.value for one in metrics[f"sglang_mixed_{metric}"].samples] == [report[field]]


def test_activations_are_those_counted_and_a_reset_does_not_turn_them_back(
    server: Server, metrics: Mapping[str, Metric]
) -> None:
    counted = http(f"{server.url}/mixed_precision/experts/reset", {})
    for scraped in (metrics, ours(scrape(server))):
        samples = scraped["sglang_mixed_expert_activations"].samples
        found = {(one.labels["layer"], one.labels["phase"]): one.value for one in samples}
        for row, layer in enumerate(counted["sglang_mixed"]["layers"]):
            for phase in ("prefill", "decode"):
                assert found[str(layer), phase] == sum(counted["sglang_mixed"][phase][row]) > 0
        hottest = scraped["sglang_mixed_top_expert_activations"].samples[0]
        best = counted["top_experts"][0]
        assert hottest.value == best["activation_count"]
        assert hottest.labels == {"layer": str(best["layer_id"]), "expert": str(best["expert_id"])}


def test_labels_have_no_more_values_than_the_model_has_parts(metrics: Mapping[str, Metric]) -> None:
    samples = [sample for family in metrics.values() for sample in family.samples]
    for sample in samples:
        for label, value in sample.labels.items():
            assert value in VALUES[label]
    assert len(metrics["sglang_mixed_top_expert_activations"].samples) == 10
    assert len(samples) < 50


def test_promtool_finds_nothing_to_object_to(server: Server) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool on this machine: apt install prometheus")
    text = "".join(line for line in scrape(server).splitlines(keepends=True) if "sglang_mixed" in line)
    checked = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def dashboard_queries() -> list[str]:
    """What the panels of the dashboard ask, with Grafana's variables filled in."""
    dashboard = json.loads((EXAMPLES / "grafana" / "dashboard.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return [query.replace("$instance", ".*").replace("$__rate_interval", "10s") for query in queries]


def test_the_dashboard_asks_for_metrics_that_are_there(metrics: Mapping[str, Metric]) -> None:
    asked = {name for query in dashboard_queries() for name in re.findall(r"sglang_mixed_\w+", query)}
    assert asked <= {sample.name for family in metrics.values() for sample in family.samples}
    assert len(asked) >= 6


def test_prometheus_scrapes_them_and_answers_every_panel(
    server: Server, prompts: list[list[int]], tmp_path: Path
) -> None:
    prometheus = shutil.which("prometheus")
    if prometheus is None:
        pytest.skip("no Prometheus on this machine: apt install prometheus")
    described = (
        (EXAMPLES / "grafana" / "prometheus.yml").read_text().replace("scrape_interval: 5s", "scrape_interval: 1s")
    )
    (tmp_path / "prometheus.yml").write_text(described.replace("127.0.0.1:30000", server.url.removeprefix("http://")))
    port = free_port()
    where = (f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data")
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [prometheus, *where, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log
        )
    try:
        deadline, left = time.monotonic() + 60, dashboard_queries()
        while left and time.monotonic() < deadline:
            server.generate(prompts[:1], sampling_params={"max_new_tokens": 2, "temperature": 0})
            left = [query for query in left if not answers(port, query)]
        assert left == [], (tmp_path / "log").read_text()
    finally:
        process.kill()
        process.wait()


def answers(port: int, query: str) -> bool:
    """Whether Prometheus has a value for this."""
    try:
        reply = http(f"http://127.0.0.1:{port}/api/v1/query?query={urllib.parse.quote(query)}")
    except OSError:  # it is starting, or it does not understand the query
        return False
    return any(float(one["value"][1]) > 0 for one in reply["data"]["result"])
