"""Decode steps per second with experts counted ÷ without: one model in this process, the steps in turn."""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import report
from sglang.srt.plugins import load_plugins
from synthetic import CONFIG, write, write_map

load_plugins()

import torch  # noqa: E402
from sglang.benchmark import one_batch  # noqa: E402
from sglang.srt.entrypoints.engine import Engine  # noqa: E402
from sglang.srt.layers.moe import initialize_moe_config  # noqa: E402
from sglang.srt.runtime_context import publish  # noqa: E402
from sglang.srt.server_args import PortArgs  # noqa: E402

from sglang_mixed.engine import state  # noqa: E402

TINY = Path(__file__).parents[1] / "examples" / "tiny" / "bf16"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runner = load(Path(folder), options.layers)
        ok = [compare(runner, batch, options.steps) for batch in (1, 8)]
    return 0 if all(ok) else 1


def load(folder: Path, layers: int) -> Any:
    """SGLang's model runner with a uniform BF16 map, as its own benchmark of single batches runs it."""
    model = write(folder / "bf16", "bf16", layers)
    mix = {
        "enable_mixed_precision": True,
        "mixed_precision_config": str(write_map(folder / "map.yaml", {}, bf16=model)),
    }
    small = {"mem_fraction_static": 0.2, "max_total_tokens": 16384, "log_level": "error"}
    server_args = Engine.server_args_class(model_path=str(model), tokenizer_path=str(TINY), **small, **mix)
    publish(server_args, role="scheduler")
    initialize_moe_config()
    runner, _ = one_batch.load_model(server_args, PortArgs.init_new(server_args), 0, 0)
    return runner


def compare(runner: Any, batch: int, steps: int) -> bool:
    """Whoever slows the machine down slows both kinds of steps: the medians are compared."""
    tracker = state.tracker
    assert tracker is not None
    prompts = torch.randint(2, CONFIG["vocab_size"], (batch, 4), generator=torch.Generator().manual_seed(0)).tolist()
    runner.clear()
    tokens, _, running = runner.extend(one_batch.prepare_synthetic_inputs_for_latency_test(batch, 4, prompts))
    seconds: dict[bool, list[float]] = {True: [], False: []}
    counted = tracker.counts()
    for step in range(2 * steps):
        counts = step // 2 % 2 == step % 2  # in turn first and second, so that a pair's order favours none
        state.tracker = tracker if counts else None
        started = time.perf_counter()
        tokens, _ = runner.decode(tokens, running)
        seconds[counts].append(time.perf_counter() - started)
    state.tracker = tracker
    routed = tracker.counts().decode.sum() - counted.decode.sum()
    assert routed == steps * batch * counted.top_k * len(counted.layers), "the steps that were to be counted"
    without, with_counts = statistics.median(seconds[False]), statistics.median(seconds[True])
    baseline = f"--disable-expert-tracking, {1 / without:.1f} steps/s"
    return report(
        f"decode with experts counted, batch {batch}", without / with_counts, "x", baseline, 0.99, at_least=True
    )


if __name__ == "__main__":
    sys.exit(main())
