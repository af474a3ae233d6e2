"""20,000 mutants of checkpoints and maps: each is refused by an error of ours, or loaded correctly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from .mutator import dump, parse
from .run import memory_folder
from .targets import Corpus, Fuzzer

ROOT = Path(__file__).parents[2]


def test_the_corpus_is_sound_and_serialized_as_it_was_parsed() -> None:
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory_folder()) as folder:
        corpus = Corpus(Path(folder))
        for file in (*corpus.shards, *corpus.configs, corpus.index):
            assert parse(dump(file.tree)) == file.tree
        Fuzzer(corpus, 0).load()


@pytest.mark.parametrize(("is_fresh", "skips_asserts"), [(False, ()), (True, ("-O",))])
def test_a_mutant_is_refused_by_an_error_of_ours_or_loaded_correctly(
    is_fresh: bool, skips_asserts: tuple[str, ...]
) -> None:
    seed = int.from_bytes(os.urandom(4), "little") if is_fresh else 1
    command = [sys.executable, *skips_asserts, "-m", "tests.fuzz.run", "--mutants", "10000", "--seed", str(seed)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, f"{' '.join(command)}\n{ran.stderr}"
    report = json.loads(ran.stdout)
    assert (report["mutants"], report["optimized"]) == (10_000, len(skips_asserts))
    reached = {outcome.partition(": ")[0] for outcome in report["outcomes"] if outcome.endswith(": loaded")}
    assert reached == {"header", "folder", "map", "plan"}
