"""`sglang-mixed compare A B`: two servers, or two maps that are served one after the other, on one text."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from rich.console import Console
from rich.progress import Progress

from ..comparison import Predictions, Server, compare_predictions
from ..config import load_map
from ..errors import EngineError
from ..plan import make_plan
from ..preflight import free_port
from .check import human
from .experts import is_url
from .sensitivity import read_windows
from .tables import number_table

#: What the speed is measured with: prompts at once, tokens each generates, and rounds.
PROMPTS, NEW_TOKENS, ROUNDS = 8, 64, 3


def run(
    given: tuple[str, str],
    text: Path,
    *,
    tokens: int = 8192,
    window: int = 256,
    top: int = 128,
    api_key: str | None = None,
    picture: Path | None = None,
    flags: Sequence[str] = (),
) -> dict[str, Any]:
    """Compare, with a progress bar on stderr; everything as JSON values.

    `flags` are SGLang's, for servers that are started here. Raises EngineError.
    """
    names = [urlparse(one).netloc if is_url(one) else Path(one).name for one in given]
    predictions: list[Predictions] = []
    speeds: list[list[float]] = []
    memory: list[int | None] = []
    with Progress(console=Console(stderr=True)) as bar:
        for name, one in zip(names, given, strict=True):
            with served(one, api_key, flags) as server:
                windows = read_windows(text, Path(server.tokenizer_path()), tokens, window).tolist()
                task = bar.add_task(name, total=len(windows))
                predictions.append(server.predict(windows, top, lambda one, task=task: bar.advance(task, one)))  # type: ignore[misc]
                memory.append(server.weight_bytes())
                if not all(map(is_url, given)):
                    speeds.append([server.tokens_per_second(windows[:PROMPTS], NEW_TOKENS) for _ in range(ROUNDS + 1)])
    if not speeds:
        servers = [Server(one, api_key) for one in given]
        rounds = [[one.tokens_per_second(windows[:PROMPTS], NEW_TOKENS) for one in servers] for _ in range(ROUNDS + 1)]
        speeds = [list(found) for found in zip(*rounds, strict=True)]
    _check_same(predictions, given)
    report = {"names": names, "given": list(given)} | compare_predictions(predictions[0], predictions[1])
    # The first round warms up.
    report["tokens_per_second"] = [_spread(found[1:]) for found in speeds]
    report["interleaved"] = all(map(is_url, given))
    report["weight_bytes"] = memory
    if picture is not None:
        from ..comparison.picture import draw

        draw(picture, names, report)
    return report


@contextmanager
def served(given: str, api_key: str | None, flags: Sequence[str]) -> Iterator[Server]:
    """A running server as it is; a map, or a checkpoint, behind one of our own that ends afterwards."""
    if is_url(given):
        yield Server(given, api_key)
        return
    model = given
    if not Path(given).is_dir():
        described = load_map(given)
        model = str(described.sources[make_plan(described).base])
    address = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "sglang_mixed.cli.main", "serve", "-m", model, "-a", address, *flags]
    command += [] if Path(given).is_dir() else ["-c", given]
    with tempfile.NamedTemporaryFile(suffix=".log", prefix="sglang-") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            server = Server(f"http://{address}")
            _wait(server, process, Path(log.name), given)
            yield server
        finally:
            process.terminate()
            process.wait(60)


def _wait(server: Server, process: subprocess.Popen[bytes], log: Path, given: str) -> None:
    while not server.is_ready():
        if process.poll() is not None:
            lines = log.read_text(errors="replace").splitlines()[-12:]
            raise EngineError(
                "its server ended at the start:\n    " + "\n    ".join(lines),
                file=given,
                remedy="run sglang-mixed serve with it to see why",
            )
        time.sleep(0.5)


def _check_same(predictions: Sequence[Predictions], given: Sequence[str]) -> None:
    one, other = (found.logprobs.shape for found in predictions)
    if one != other:
        raise EngineError(
            f"{given[0]} reads the text as {one}, {given[1]} as {other} predictions",
            rule="both servers have the same tokenizer",
            remedy="compare two versions of one model",
        )


def _spread(rounds: Sequence[float]) -> dict[str, float]:
    return {"value": statistics.median(rounds), "low": min(rounds), "high": max(rounds)}


def render(report: dict[str, Any]) -> None:
    """Print both side by side."""
    names = report["names"]
    table = number_table(f"{report['predictions']:,} predictions in {report['windows']} windows", "", *names)
    table.add_row("perplexity", *map(_interval, report["perplexity"]))
    table.add_row("tokens/s", *map(_interval, report["tokens_per_second"]))
    table.add_row("weights", *("" if size is None else human(size) for size in report["weight_bytes"]))
    console = Console(soft_wrap=True, highlight=False)
    console.print(table)
    console.print(f"KL({names[0]} || {names[1]}): mean {_interval(report['divergence'])} nats a token,", markup=False)
    console.print(
        f"  99th percentile {_interval(report['divergence_p99'])}; top {report['top']} tokens, the rest as one"
    )
    console.print(f"the same likeliest token: {_interval(report['top_1_agreement'])}")
    console.print(f"perplexity of the second by the first: {_interval(report['perplexity_ratio'])}")
    rounds = "in turns" if report["interleaved"] else "one after the other"
    console.print(f"intervals: 95 %, windows drawn again; of tokens/s, all {ROUNDS} rounds, {rounds}")


def _interval(one: dict[str, float]) -> str:
    return f"{one['value']:.4g} [{one['low']:.4g}, {one['high']:.4g}]"
