"""`python -m attacks.run`: try every attack, print what came of each, and write the table into README.md.

Each runs with 64 MiB of memory beyond what the process had before it. No assert is used: `python -O` changes nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import torch

from sglang_mixed.errors import MixedPrecisionError
from sglang_mixed.plan import make_plan
from sglang_mixed.plan.originals import compare_with_originals
from sglang_mixed.plan.values import verify_values

from . import configs, headers, indexes, maps, sources, tensors
from .base import Attack, write_mix

MEMORY = 64 << 20
GROUPS = {one.__name__.rpartition(".")[2]: one.ATTACKS for one in (headers, indexes, configs, tensors, sources, maps)}
ATTACKS = [attack for group in GROUPS.values() for attack in group]
README = Path(__file__).parent / "README.md"


class Outcome(NamedTuple):
    """What came of an attack; `problem` is empty if it is what the table expects."""

    number: int
    attack: Attack
    error: MixedPrecisionError | None
    problem: str


def attempt(map_path: Path) -> None:
    """What `check --verify-values` does, and the reading of every planned tensor."""
    plan = make_plan(map_path)
    for checkpoint in plan.checkpoints.values():
        checkpoint.check_index()
    verify_values(plan)
    compare_with_originals(plan)


def carry_out(number: int, attack: Attack, sound: Path, folder: Path) -> Outcome:
    """Break a copy of a sound mix, and see what comes of it."""
    shutil.copytree(sound, folder)
    attack.build(folder)
    error: MixedPrecisionError | None = None
    try:
        with bounded_memory(MEMORY):
            attempt(folder / "map.yaml")
    except MixedPrecisionError as caught:
        error = caught
    except Exception as caught:
        return Outcome(number, attack, None, f"{type(caught).__name__}: {caught}"[:300])
    problem = "its code was run" if (folder / "opened").exists() else judge(attack, error)
    return Outcome(number, attack, error, problem)


def judge(attack: Attack, error: MixedPrecisionError | None) -> str:
    """What differs from what the table expects."""
    if error is None or attack.error is None:
        return "" if error is attack.error else f"accepted: {error is None}; {error}"
    text = str(error.rule or "") + str(error.what)
    if type(error) is not attack.error and not (attack.error.__subclasses__() and isinstance(error, attack.error)):
        return f"{type(error).__name__}: {error}"
    if not error.rule or not (error.file or error.tensor):
        return f"it names no rule, or no place: {error}"
    if attack.rule not in text:
        return f"another rule: {error}"
    if attack.file and not str(error.file).endswith(attack.file):
        return f"another file: {error}"
    if attack.tensor and error.tensor != attack.tensor:
        return f"another tensor: {error}"
    return ""


@contextlib.contextmanager
def bounded_memory(size: int) -> Iterator[None]:
    """Let the process have so many bytes more than it has; what asks for more gets a MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[5])
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (pages * resource.getpagesize() + size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def run() -> list[Outcome]:
    """All attacks, on a file system in memory where the host has one."""
    torch.set_num_threads(1)
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="attacks-", dir=memory) as folder:
        sound = Path(folder) / "sound"
        attempt(write_mix(sound))
        for number, attack in enumerate(ATTACKS, 1):
            broken = Path(folder) / str(number)
            outcomes.append(carry_out(number, attack, sound, broken))
            shutil.rmtree(broken)
    return outcomes


def table(outcomes: list[Outcome]) -> str:
    """README.md."""
    lines = [
        "# Attacks",
        "",
        "Checkpoints and maps as an attacker or a broken download leaves them. `python -m attacks.run` breaks a sound",
        "mix in each of these ways, lets 64 MiB of memory be taken beyond what the process has, and writes this table;",
        "`tests/test_attacks.py` holds it to what is written here.",
        "",
    ]
    for name, group in GROUPS.items():
        lines += [f"## {name.capitalize()}", "", "| | attack | refused by | rule |", "| ---: | --- | --- | --- |"]
        for one in outcomes:
            if one.attack in group:
                refused = type(one.error).__name__ if one.error else "nothing: it is left alone"
                rule = str((one.error.rule or one.error.what) if one.error else "").replace("|", "\\|").splitlines()
                lines.append(f"| {one.number} | {one.attack.name} | {refused} | {' '.join(rule)[:160]} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="Compare with README.md instead of writing it.")
    only_check, started = parser.parse_args().check, time.monotonic()
    outcomes = run()
    wrong = [one for one in outcomes if one.problem]
    for one in wrong:
        print(f"{one.number} {one.attack.name}: {one.problem}", file=sys.stderr)
    refused = sum(one.error is not None for one in outcomes)
    found = {"kinds": len(outcomes), "refused": refused, "left_alone": len(outcomes) - refused, "wrong": len(wrong)}
    date = datetime.now(UTC).isoformat(timespec="seconds")
    seconds = round(time.monotonic() - started, 1)
    versions = {"python": platform.python_version(), "optimized": sys.flags.optimize}
    print(json.dumps({"what": "attacks", "date": date, **versions, **found, "seconds": seconds}))
    if only_check and table(outcomes) != README.read_text():
        print("attacks/README.md is not what comes of the attacks: run python -m attacks.run", file=sys.stderr)
        return 1
    if not wrong and not only_check:
        README.write_text(table(outcomes))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
