"""What every benchmark here shares: interleaved timing, and one JSON object a line."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple


class Timing(NamedTuple):
    """Seconds."""

    minimum: float
    median: float


def interleaved(
    runs: Mapping[str, Callable[[int], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Timing]:
    """Time all runs in turn, `repeats` times, so that a busy machine slows all alike; a run gets its repeat's number.

    The first round warms up and isn't counted. For work of one thread, `time.thread_time` as the clock leaves out
    what other processes took of the core.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            start = clock()
            run(repeat)
            seconds[name].append(clock() - start)
    return {name: Timing(min(times[1:]), statistics.median(times[1:])) for name, times in seconds.items()}


def report(measure: str, value: float, unit: str, baseline: str, bar: float | None, *, at_least: bool = False) -> bool:
    """Print one result; whether it is within its bar (an upper one unless `at_least`; None: only told)."""
    ok = bar is None or (value >= bar if at_least else value <= bar)
    line = {"measure": measure, "value": round(value, 4), "unit": unit, "baseline": baseline, "bar": bar, "ok": ok}
    print(json.dumps(line), flush=True)
    return ok
