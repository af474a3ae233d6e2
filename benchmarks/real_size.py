"""Inspect and size the real-size Qwen3-235B-A22B: time ÷ json.loads of the same headers, and peak memory.

The checkpoints are the sparse files of planning.py; all sides run interleaved.
"""

from __future__ import annotations

import gc
import resource
import sys
import time
from pathlib import Path

from measure import interleaved, report
from planning import QUANTIZATION, on_checkpoints, parse_headers

from sglang_mixed.cli import inspect, size

RATIO_BAR, MEMORY_BAR_MIB = 2.0, 1000


def measure(folder: Path, count: int, repeats: int) -> int:
    paths = [str(folder / kind) for kind in QUANTIZATION]
    runs = {
        "parse": lambda _: parse_headers(folder),
        "inspect": lambda _: inspect.describe_all(paths),
        "size": lambda _: size.describe(folder / "map.yaml"),
    }
    for run in runs.values():
        run(0)
    # What the imports left would otherwise be searched for cycles in every round.
    gc.collect()
    gc.freeze()
    seconds = interleaved(runs, repeats, time.thread_time)
    parse = seconds["parse"]
    what = f"json.loads of the headers of {count:,} tensors, {parse.minimum:.3f} s"
    verdicts = []
    for name in ("inspect", "size"):
        taken = seconds[name]
        verdicts.append(report(f"{name}_235b_ratio", taken.minimum / parse.minimum, "x", what, RATIO_BAR))
        report(f"{name}_235b_ratio_median", taken.median / parse.median, "x", what, None)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    verdicts.append(
        report("inspect_and_size_235b_peak_memory", peak, "MiB", "whole process, torch included", MEMORY_BAR_MIB)
    )
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(on_checkpoints(measure, __doc__))
