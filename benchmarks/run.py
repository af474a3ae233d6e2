"""All benchmarks that need no GPU, one after another; fails if one misses a bar."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCHMARKS = (
    "planning.py",
    "real_size.py",
    "search.py",
    "search_real_size.py",
    "cpu_linear.py",
    "moe_mix.py",
    "loading.py",
    "serving.py",
    "tracking.py",
)

if __name__ == "__main__":
    folder = Path(__file__).parent
    missed = [name for name in BENCHMARKS if subprocess.run([sys.executable, folder / name]).returncode]
    if missed:
        sys.exit(f"missed: {', '.join(missed)}")
