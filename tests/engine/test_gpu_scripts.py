"""What measures and checks on a GPU is imported here, so that it keeps up with what it uses; it runs only there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [*(ROOT / "scripts" / "gpu").glob("*.py"), *(ROOT / "benchmarks").glob("gpu_*.py")]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_gpu_s_script_finds_all_that_it_imports(path: Path) -> None:
    code = f"import runpy; runpy.run_path({str(path)!r}, run_name='imported')"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert not found.returncode, found.stderr[-2000:]
