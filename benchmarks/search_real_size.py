"""Plan the real-size Qwen3-235B-A22B from three checkpoints: seconds, memory, and the lines of the map.

The checkpoints are sparse files with true headers (planning.py), the errors drawn at random: 12,220 units, of them
12,032 experts. A map that does not read back to the same choice ends the run.
"""

from __future__ import annotations

import random
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

from measure import report
from planning import EXPERTS, LAYERS, QUANTIZATION, write_checkpoint

from sglang_mixed.cli.plan import run
from sglang_mixed.sensitivity import Measure, Sensitivity, write_sensitivity

#: Error of an attention matrix, by source; an expert's is less by its share of the tokens.
TYPICAL = {"fp8": 7e-4, "gptq": 1.2e-2}
SECONDS_BAR, LINES_BAR = 60.0, 2000
BUDGETS = {"one rank": {"budget": "160GiB"}, "TP 8, EP 8": {"budget": "24GiB", "tp": 8, "ep": 8}}


def random_errors() -> Sensitivity:
    draw = random.Random(0)
    errors: dict[str, dict[str, float]] = {source: {} for source in TYPICAL}
    for layer in range(LAYERS):
        attention, experts = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp.experts"
        shares = {f"{attention}.qkv_proj": 1.0, f"{attention}.o_proj": 1.0}
        shares |= {f"{experts}.{expert}": 8 / EXPERTS for expert in range(EXPERTS)}
        for unit, share in shares.items():
            for source, typical in TYPICAL.items():
                errors[source][unit] = typical * share * draw.lognormvariate(0, 1)
    return Sensitivity(Measure.DIVERGENCE, "bf16", errors, details={"tokens": 1})


def main() -> int:
    folder = Path(tempfile.mkdtemp(prefix="search-"))
    try:
        sources = [f"{kind}={folder / kind}" for kind in QUANTIZATION]
        for kind in QUANTIZATION:
            write_checkpoint(folder / kind, kind)
        write_sensitivity(folder / "errors.json", random_errors())
        verdicts = []
        for name, budget in BUDGETS.items():
            for formats in (3, 2):
                start = time.perf_counter()
                found = run(
                    sources,
                    folder / "map.yaml",
                    **budget,
                    formats_per_layer=formats,
                    sensitivity=folder / "errors.json",
                )
                seconds = time.perf_counter() - start
                what = f"{name}, {formats} formats a layer, {found['units']:,} units, gap {found['gap']:.2%}"
                verdicts.append(report("plan_235b_seconds", seconds, "s", what, SECONDS_BAR))
                verdicts.append(report("plan_235b_map_lines", found["lines"], "lines", what, LINES_BAR))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        report("plan_235b_peak_memory", peak, "MiB", "whole process, torch included", None)
        return 0 if all(verdicts) else 1
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
