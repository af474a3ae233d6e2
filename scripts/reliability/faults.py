"""Twelve faults in our own code, each put into a copy of the package; the tests of its room must notice every one.

python scripts/reliability/faults.py
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from common import ROOT, record


class Fault(NamedTuple):
    """A line as it is and as a mistake would leave it, and the tests that must notice."""

    name: str
    file: str
    line: str
    mistaken: str
    tests: tuple[str, ...]


FAULTS = [
    Fault("a header's gaps are let through", "checkpoint/examine.py", "if begin != place:", "if begin < place:", ("tests/checkpoint/test_header.py",)),
    Fault("a shape's bytes are not held against its offsets", "checkpoint/header.py", 'if offsets != f"{begins_at},{ends_at}":', "if False:", ("tests/checkpoint/test_header.py",)),
    Fault("a shard that is missing is left out", "checkpoint/folder.py", "        if not is_own_file(folder / name):", "        if False:", ("tests/checkpoint/test_folder.py",)),
    Fault("the last of two equal keys counts", "checkpoint/json_file.py", "if _count_commas(raw) != _commas(value) and", "if False and", ("tests/fuzz/test_properties.py",)),
    Fault("a read of a part begins one row late", "checkpoint/reading.py", "first = entry.begin + ranges[depth][0] * strides[depth]", "first = entry.begin + (ranges[depth][0] + 1) * strides[depth]", ("tests/checkpoint/test_checkpoint.py", "tests/fuzz/test_properties.py")),
    Fault("GPTQ's zero points of v1 are read as v2's", "formats/gptq.py", 'ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}', 'ZERO_OFFSETS = {"gptq": 0, "gptq_v2": 0}', ("tests/formats/test_formats.py",)),
    Fault("AWQ's columns are not put in order", "formats/awq.py", "codes[..., column] = (words >> (BITS * nibble)) & 15", "codes[..., nibble] = (words >> (BITS * nibble)) & 15", ("tests/formats/test_formats.py",)),
    Fault("NaN among scales is let through", "formats/values.py", "    _check_finite(local, scale)\n", "", ("tests/fuzz/test_properties.py",)),
    Fault("a cut ends inside a group", "formats/slicing.py", "unit = math.lcm(*units)", "unit = 1", ("tests/formats/test_slicing.py", "tests/fuzz/test_properties.py")),
    Fault("an earlier line of the map wins", "plan/resolve.py", "sorted(parsed, key=lambda pair: pair[1].exact)", "sorted(parsed[::-1], key=lambda pair: pair[1].exact)", ("tests/plan/test_resolve.py",)),
    Fault("another model's norms pass as the base's", "plan/same_base.py", "RELATIVE, ABSOLUTE = 2.0**-7, 2.0**-20", "RELATIVE, ABSOLUTE = 2.0**7, 2.0**20", ("tests/plan/test_same_base.py",)),
    Fault("two ranks hold the same experts", "plan/rank.py", "first = rank.number // rank.expert_tp * local", "first = 0", ("tests/plan/test_rank.py", "tests/fuzz/test_plan_properties.py")),
]  # fmt: skip


def main() -> int:
    found = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("src", "tests", "attacks", "examples"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        for fault in FAULTS:
            caught = try_fault(copy, fault)
            print(f"{fault.name}: {caught or 'NOT CAUGHT'}", flush=True)
            found.append({"name": fault.name, "file": fault.file, "caught_by": caught})
    caught_all = sum(bool(one["caught_by"]) for one in found)
    record("faults", injected=len(found), caught=caught_all, faults=found)
    return 0 if caught_all == len(found) else 1


def try_fault(copy: Path, fault: Fault) -> str:
    """The first test that fails with the fault; empty if none does."""
    file = copy / "src" / "sglang_mixed" / fault.file
    text = file.read_text()
    if text.count(fault.line) != 1:
        raise SystemExit(f"{fault.name}: {fault.file} does not hold this line once: {fault.line}")
    file.write_text(text.replace(fault.line, fault.mistaken))
    try:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider", *fault.tests]
        environment = os.environ | {"PYTHONPATH": str(copy / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
        ran = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
        failed = [line for line in ran.stdout.splitlines() if line.startswith("FAILED ")]
        return f"`{failed[0].removeprefix('FAILED ').partition(' - ')[0]}`" if failed else ""
    finally:
        file.write_text(text)


if __name__ == "__main__":
    sys.exit(main())
