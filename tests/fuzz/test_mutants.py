"""20,000 mutants of checkpoints and maps: each is refused by an error of ours, or loaded correctly."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .mutator import dump, parse
from .run import memory_folder
from .targets import Corpus, Fuzzer


@pytest.fixture(scope="module")
def corpus() -> Iterator[Corpus]:
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory_folder()) as folder:
        yield Corpus(Path(folder))


def test_the_corpus_is_sound_and_serialized_as_it_was_parsed(corpus: Corpus) -> None:
    for file in (*corpus.shards, *corpus.configs, corpus.index):
        assert parse(dump(file.tree)) == file.tree
    Fuzzer(corpus, 0)._load()


@pytest.mark.parametrize("seed", [1, int.from_bytes(os.urandom(4), "little")], ids=["fixed", "fresh"])
def test_a_mutant_is_refused_by_an_error_of_ours_or_loaded_correctly(corpus: Corpus, seed: int) -> None:
    fuzzer = Fuzzer(corpus, seed)
    try:
        fuzzer.run(10_000)
    except Exception as error:
        error.add_note(f"python -m tests.fuzz.run --seed {seed}")
        raise
    assert fuzzer.outcomes.total() == 10_000
    reached = {outcome.partition(": ")[0] for outcome in fuzzer.outcomes if outcome.endswith(": loaded")}
    assert reached == {"header", "folder", "map", "plan"}
