"""`python -m tests.fuzz.run --mutants 1000000 --seed 1`: prints the outcomes as one JSON object.

It uses no assert, so that `python -O` changes nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from .targets import Corpus, Fuzzer, Wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutants", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory_folder()) as folder:
        fuzzer = Fuzzer(Corpus(Path(folder)), arguments.seed)
        try:
            fuzzer.run(arguments.mutants)
        except Wrong as wrong:
            print(f"mutant {fuzzer.outcomes.total() + 1} of seed {arguments.seed}: {wrong}", file=sys.stderr)
            raise
    report = {
        "what": "fuzz",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "optimized": sys.flags.optimize,
        "seed": arguments.seed,
        "mutants": fuzzer.outcomes.total(),
        "seconds": round(time.monotonic() - started, 1),
        "outcomes": dict(sorted(fuzzer.outcomes.items())),
    }
    print(json.dumps(report))
    return 0


def memory_folder() -> str | None:
    """A file system in memory, where the host has one."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


if __name__ == "__main__":
    sys.exit(main())
