"""Every attack of the catalogue is refused as its table says, within 64 MiB, in a process that skips asserts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from attacks.run import ATTACKS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def carried_out() -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-O", "-m", "attacks.run", "--check"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_every_attack_is_refused_by_its_rule_and_the_table_says_so(
    carried_out: subprocess.CompletedProcess[str],
) -> None:
    assert carried_out.returncode == 0, carried_out.stderr
    found = json.loads(carried_out.stdout)
    assert (found["kinds"], found["wrong"], found["optimized"]) == (len(ATTACKS), 0, 1)
    assert found["refused"] >= 60


def test_each_kind_is_listed_once() -> None:
    kinds = [(attack.name, attack.rule) for attack in ATTACKS]
    assert len(set(kinds)) == len(kinds)
