"""Loading on the CPU: bytes read ÷ planned bytes, and load time ÷ stock SGLang's for an equally large checkpoint.

Experts have a real model's widths. Every load runs in a process of its own, as a server's does, the files being in the
page cache; sides take turns. Models are of 1.2 GiB: what a load costs at any size (the plan, the kernels' import, 25 ms
together) is an eighth of the time at half of that and nothing at the sizes that are served.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import report
from synthetic import REAL_WIDTHS, write, write_map

#: Layers of the mix, 1,158 MiB, and of what it is compared with, 1,231 MiB.
MIXED_LAYERS, STOCK_LAYERS = 12, 5
RULES = {"model.layers.{0..3}.mlp.experts.**": "fp8", "model.layers.{4..11}.mlp.experts.**": "gptq"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", help="load with these engine arguments (JSON) and print seconds and figures")
    options = parser.parse_args()
    if options.child:
        print(json.dumps(load(json.loads(options.child))))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sources = {kind: write(folder / kind, kind, MIXED_LAYERS, **REAL_WIDTHS) for kind in ("bf16", "fp8", "gptq")}
        stock = write(folder / "stock", "bf16", STOCK_LAYERS, **REAL_WIDTHS)
        sides = {
            "stock": {"model_path": str(stock)},
            "uniform": mixed(stock, write_map(folder / "uniform.yaml", {}, bf16=stock)),
            "mixed": mixed(sources["bf16"], write_map(folder / "map.yaml", RULES, **sources)),
        }
        outcomes: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
        for _ in range(options.repeats):
            for name, arguments in sides.items():
                outcomes[name].append(run_child(arguments))
        stock_bytes = sum(file.stat().st_size for file in stock.glob("*.safetensors"))
    seconds = {name: min(outcome["seconds"] for outcome in found) for name, found in outcomes.items()}
    figures = outcomes["mixed"][-1]["memory"]
    per_byte = seconds["mixed"] / figures["planned_bytes"] / (seconds["stock"] / stock_bytes)
    baseline = f"stock SGLang, {stock_bytes / 2**20:.0f} MiB BF16 in {seconds['stock']:.3f} s"
    checks = [
        report("bytes read / planned bytes", figures["bytes_read"] / figures["planned_bytes"], "x", "plan", 1.02),
        report("load time, uniform BF16 map", seconds["uniform"] / seconds["stock"], "x", baseline, 1.1),
        report("load time per byte, BF16 + FP8 + Int4", per_byte, "x", baseline, 1.1),
        report("mixed model", figures["planned_bytes"] / 2**20, "MiB", "", None),
    ]
    return 0 if all(checks) else 1


def mixed(model: Path, described: Path) -> dict[str, Any]:
    return {"model_path": str(model), "enable_mixed_precision": True, "mixed_precision_config": str(described)}


def run_child(arguments: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", json.dumps(arguments)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    outcome: dict[str, Any] = json.loads(output.splitlines()[-1])
    return outcome


def load(arguments: dict[str, Any]) -> dict[str, Any]:
    from in_process import prepare

    from sglang_mixed import get_mixed_precision_memory_stats

    run = prepare(**arguments)
    started = time.perf_counter()
    model = run()
    seconds = time.perf_counter() - started
    assert model is not None
    memory = None
    if arguments.get("enable_mixed_precision"):
        while (memory := get_mixed_precision_memory_stats())["verification"]["state"] == "running":
            time.sleep(0.05)
    return {"seconds": seconds, "memory": memory}


if __name__ == "__main__":
    sys.exit(main())
