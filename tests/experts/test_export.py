from __future__ import annotations

import csv
import json
import os
import resource
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sglang_mixed.errors import ExpertCountsError, ExpertExportError
from sglang_mixed.experts import ExpertExport, ExpertFormats, merge, read_export, write_export
from sglang_mixed.experts.files import write_csv

from .synthetic import counts

FORMATS = ExpertFormats(("FP8 128x128", "GPTQ int4 g128"), np.array([[0] * 3 + [1] * 5] * 2))


def historical(export: ExpertExport) -> dict[str, Any]:
    """The export as a program writes it that knows the three fields only."""
    value = json.loads(json.dumps(export.to_json()))
    del value["sglang_mixed"]
    return value


@contextmanager
def no_room_on_disk() -> Iterator[None]:
    """No file of this process may grow beyond 100 bytes: writes then fail as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)


def test_an_export_survives_its_file_to_the_last_bit(tmp_path: Path) -> None:
    export = ExpertExport.of_counts(counts(layers=(1, 4)), FORMATS)
    write_export(tmp_path / "a.json", export)
    assert read_export(tmp_path / "a.json").to_json() == export.to_json()


def test_a_server_counts_each_routed_token_as_one_activation() -> None:
    one = counts(layers=(3, 4))
    stats = ExpertExport.of_counts(one).to_json()
    assert [entry["activation_count"] for entry in stats["expert_stats"].values()] == one.total.ravel().tolist()
    assert all(entry["activation_count"] == entry["total_tokens_processed"] for entry in stats["expert_stats"].values())
    assert list(stats["layer_stats"]) == [3, 4]
    assert stats["layer_stats"][3]["total_experts"] == 8
    assert stats["layer_stats"][4]["total_tokens"] == one.top_k * 100
    assert len(stats["top_experts"]) == 10
    assert stats["top_experts"][0]["activation_count"] == one.total.max()


def test_merging_adds_counts_and_keeps_formats_that_agree() -> None:
    parts = [ExpertExport.of_counts(counts(seed=seed), FORMATS) for seed in range(3)]
    merged = merge(parts)
    assert merged.counts is not None and merged.formats is not None
    assert np.array_equal(merged.counts.total, sum(part.grid()[1] for part in parts))
    assert merged.to_json()["expert_stats"] == ExpertExport.of_counts(merged.counts).to_json()["expert_stats"]
    other = ExpertFormats(FORMATS.labels, 1 - FORMATS.cells)
    assert merge([parts[0], ExpertExport.of_counts(counts(), other)]).formats is None


def test_merging_with_an_older_export_keeps_what_both_know() -> None:
    ours = ExpertExport.of_counts(counts(), FORMATS)
    older = ExpertExport.from_json(historical(ExpertExport.of_counts(counts(seed=5))))
    merged = merge([ours, older])
    assert merged.counts is None
    assert np.array_equal(merged.grid()[1], counts().total + counts(seed=5).total)
    assert merge([older, ours]).experts == merged.experts


def test_exports_of_different_models_are_not_merged() -> None:
    with pytest.raises(ExpertCountsError, match="added to"):
        merge([ExpertExport.of_counts(counts()), ExpertExport.of_counts(counts(experts=4))])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1, 2]", "not an export"),
        (b'{"layers": []}', "not an export"),
        (b'{"expert_stats": [1]}', "expert_stats"),
        (b'{"expert_stats": {"layer_0_expert_0": {"layer_id": 0}}}', "layer_0_expert_0.expert_id: Field required"),
        (b'{"expert_stats": {}, "sglang_mixed": 3}', "is no object"),
        (b'{"expert_stats": {}, "sglang_mixed": {"since": "now"}}', "since is no time"),
        (b'{"expert_stats": {}, "sglang_mixed": {"prefill": []}}', "not the counts"),
        (b'{"expert_stats": {}, "sglang_mixed": {"requests": {"a": {"input_length": -1}}}}', "requests"),
    ],
    ids=str,
)
def test_a_file_that_is_no_export_is_refused_with_its_name(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "other.json"
    file.write_bytes(content)
    with pytest.raises(ExpertExportError, match=said) as caught:
        read_export(file)
    assert caught.value.file == str(file) and caught.value.remedy


@pytest.mark.parametrize(
    "change",
    [
        {"activation_count": -1},
        {"activation_count": "many"},
        {"activation_count": 2**60},
        {"expert_id": 10**9},
        {"layer_id": 1},
        {"last_activation_time": float("inf")},
    ],
    ids=str,
)
def test_an_entry_that_cannot_be_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    value = historical(ExpertExport.of_counts(counts()))
    value["expert_stats"]["layer_0_expert_0"].update(change)
    (tmp_path / "a.json").write_text(json.dumps(value))
    with pytest.raises(ExpertExportError, match="layer_0_expert_0"):
        read_export(tmp_path / "a.json")


def test_counts_that_contradict_the_known_fields_are_refused(tmp_path: Path) -> None:
    value = ExpertExport.of_counts(counts()).to_json()
    value["expert_stats"]["layer_0_expert_0"]["activation_count"] += 1
    (tmp_path / "a.json").write_text(json.dumps(value))
    with pytest.raises(ExpertExportError, match="contradict"):
        read_export(tmp_path / "a.json")


@pytest.mark.parametrize(
    "formats",
    [{"labels": ["a"]}, {"labels": ["a"], "cells": [[1] * 8] * 2}, {"labels": ["a"], "cells": [[0] * 7] * 2}, 3],
    ids=str,
)
def test_formats_that_do_not_fit_the_counts_are_refused(tmp_path: Path, formats: Any) -> None:
    value = ExpertExport.of_counts(counts(), FORMATS).to_json()
    value["sglang_mixed"]["formats"] = formats
    (tmp_path / "a.json").write_text(json.dumps(value))
    with pytest.raises(ExpertExportError, match="formats"):
        read_export(tmp_path / "a.json")


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ExpertExportError, match="No such file") as caught:
        read_export("/no/such/stats.json")
    assert caught.value.file == "/no/such/stats.json"


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "stats.json"
    write_export(file, ExpertExport.of_counts(counts(seed=1)))
    before = file.read_bytes()
    with no_room_on_disk(), pytest.raises(ExpertExportError, match="cannot be written") as caught:
        write_export(file, ExpertExport.of_counts(counts(seed=2)))
    assert caught.value.file == str(file) and caught.value.remedy
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


def test_a_written_file_has_the_usual_mode_and_a_link_stays_a_link(tmp_path: Path) -> None:
    target, link = tmp_path / "real.json", tmp_path / "link.json"
    link.symlink_to(target)
    mask = os.umask(0o027)
    try:
        write_export(link, ExpertExport.of_counts(counts()))
    finally:
        os.umask(mask)
    assert link.is_symlink() and stat.S_IMODE(target.stat().st_mode) == 0o640


def test_csv_has_a_line_for_every_expert(tmp_path: Path) -> None:
    one = counts(layers=(2, 3))
    write_csv(tmp_path / "a.csv", ExpertExport.of_counts(one, FORMATS))
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["prefill"]) + int(row["decode"]) for row in rows] == one.total.ravel().tolist()
    assert [float(row["weight_sum"]) for row in rows] == one.weights.ravel().tolist()
    assert [row["format"] for row in rows[:4]] == ["FP8 128x128"] * 3 + ["GPTQ int4 g128"]
    write_csv(tmp_path / "b.csv", ExpertExport.from_json(historical(ExpertExport.of_counts(one))))
    with (tmp_path / "b.csv").open(newline="") as file:
        older = list(csv.DictReader(file))
    assert [row["activation_count"] for row in older] == [row["activation_count"] for row in rows]
    assert {row["prefill"] for row in older} == {""}
