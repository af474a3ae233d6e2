"""The grouped Triton kernels compile for sm_90 without a GPU, and their registers do not spill."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def compiled(folder: Path, target: int, *formats: str) -> list[dict[str, Any]]:
    command = [sys.executable, str(ROOT / "benchmarks" / "kernels.py"), "--target", str(target), "--only", *formats]
    text = subprocess.run(command, capture_output=True, text=True, env={"TRITON_CACHE_DIR": str(folder)})
    lines = [json.loads(line) for line in text.stdout.splitlines()]
    assert lines and "Traceback" not in text.stderr, text.stderr[-2000:]
    return lines


@pytest.mark.parametrize("target", [80, 89, 100, 120])
def test_a_mix_compiles_for_the_gpus_before_and_after_hopper(tmp_path: Path, target: int) -> None:
    lines = compiled(tmp_path, target, "FP8 128x128 + GPTQ int4 g128")
    assert {line["kernel"] for line in lines} >= {"gate_up", "down", "gate_up_parts", "down_parts", "hash_pieces"}


def test_what_is_launched_for_a_mix_compiles_and_spills_nothing(tmp_path: Path) -> None:
    lines = compiled(tmp_path, 90, "FP8 128x128 + GPTQ int4 g128", "BF16", "GPTQ int3 g128")
    assert all(line["ok"] for line in lines)
    assert {(line["kernel"], line["rows"]) for line in lines} >= {
        *((kernel, rows) for kernel in ("gate_up", "down") for rows in (8, 16, 64)),
        *((kernel, 8) for kernel in ("gate_up_parts", "down_parts")),
        *(("linear_parts", rows) for rows in (8, 16, 32)),
        ("linear", 64),
    }
    # Weights must go to shared memory 16 bytes at a time, while products run.
    assert all(not line["spilled"] and line["registers"] <= 255 for line in lines)
    assert all(line["wide_loads"] for line in lines if line["kernel"] in ("gate_up", "gate_up_parts", "down"))
