"""Inspect and size the real-size Qwen3-235B-A22B: time ÷ json.loads of the same headers, and peak memory.

The checkpoints are the sparse files of planning.py; all sides run interleaved.
"""

from __future__ import annotations

import argparse
import gc
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

from measure import interleaved, report
from planning import MAP, QUANTIZATION, parse_headers, write_checkpoint

from sglang_mixed.cli import inspect, size

RATIO_BAR, MEMORY_BAR_MIB = 2.0, 1000


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--repeats", type=int, default=7)
    repeats = arguments.parse_args().repeats
    folder = Path(tempfile.mkdtemp(prefix="real-size-"))
    try:
        count = sum(write_checkpoint(folder / kind, kind) for kind in QUANTIZATION)
        (folder / "map.yaml").write_text(MAP)
        return measure(folder, count, repeats)
    finally:
        shutil.rmtree(folder)


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
    sys.exit(main())
