"""The map: what it holds, and one test per way in which it can be wrong."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from sglang_mixed.config import MixedPrecisionMap, Rule, load_map
from sglang_mixed.errors import (
    MapSyntaxError,
    MissingFileError,
    MixedPrecisionError,
    PatternError,
    UnknownKeyError,
    UnknownSourceError,
)

GOOD = """\
mixed_precision:
  fp16_path: base
  fp8_path: fp8
  my_own_path: own
  default: fp16
  weight_mapping:
    "model.layers.*.self_attn.*_proj.weight": fp8
    lm_head.weight: my_own
inference: {max_seq_length: 4096, max_batch_size: 32, dtype: bfloat16, device_map: auto}
server: {host: 127.0.0.1, port: 8080, max_workers: 4}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("base", "fp8", "own"):
        (tmp_path / name).mkdir()
    return tmp_path


def load(folder: Path, text: str) -> MixedPrecisionMap:
    (folder / "map.yaml").write_text(text)
    return load_map(folder / "map.yaml")


def test_a_map_is_read_whole(folder: Path) -> None:
    found = load(folder, GOOD)
    assert found.sources == {"fp16": folder / "base", "fp8": folder / "fp8", "my_own": folder / "own"}
    assert list(found.sources) == ["fp16", "fp8", "my_own"]
    assert found.default == "fp16"
    assert found.rules == (
        Rule("model.layers.*.self_attn.*_proj.weight", "fp8", 7),
        Rule("lm_head.weight", "my_own", 8),
    )
    assert found.inference.model_dump() == {
        "max_seq_length": 4096, "max_batch_size": 32, "dtype": "bfloat16", "device_map": "auto",
    }  # fmt: skip
    assert found.server.model_dump() == {"host": "127.0.0.1", "port": 8080, "max_workers": 4}


def test_all_but_the_sources_is_optional(folder: Path) -> None:
    found = load(folder, "mixed_precision:\n  fp8_path: fp8\n")
    assert (found.default, found.rules) == (None, ())
    assert not any(found.inference.model_dump().values()) and not any(found.server.model_dump().values())


def test_json_rebuilds_it(folder: Path) -> None:
    found = load(folder, GOOD)
    value = json.loads(json.dumps(found.to_json()))
    assert MixedPrecisionMap.from_json(value) == found
    assert all(Path(path).is_absolute() for path in [value["path"], *value["sources"].values()])


def test_absolute_paths_and_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    found = load(folder, f"mixed_precision: {{a_path: {folder / 'base'}, b_path: ~/fp8}}")
    assert found.sources == {"a": folder / "base", "b": folder / "fp8"}


def test_a_hub_name_is_found_in_the_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(folder / "hf"))
    repository = folder / "hf" / "hub" / "models--Qwen--Qwen3-0.6B"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc123")
    with pytest.raises(MissingFileError):
        load(folder, "mixed_precision: {a_path: Qwen/Qwen3-0.6B}")
    (repository / "snapshots" / "abc123").mkdir(parents=True)
    found = load(folder, "mixed_precision: {a_path: Qwen/Qwen3-0.6B}")
    assert found.sources == {"a": repository / "snapshots" / "abc123"}


SOURCES = "mixed_precision:\n  fp16_path: base\n  fp8_path: fp8\n"


@pytest.mark.parametrize(
    ("text", "error", "line", "says"),
    [
        ("a: [1\nb: 2", MapSyntaxError, 2, "not YAML"),
        ("- a\n- b", MapSyntaxError, None, "not a mapping"),
        ("", MapSyntaxError, None, "not a mapping"),
        ("mixed_precision: 3", MapSyntaxError, 1, "not a mapping"),
        ("inference: {}", MapSyntaxError, None, "'mixed_precision' is missing"),
        ("mixed_precision: {}", MapSyntaxError, 1, "no source"),
        ("mixed_precision: {_path: base}", MapSyntaxError, 1, "without a name"),
        ("mixed_precison: {}", UnknownKeyError, 1, "did you mean 'mixed_precision'"),
        (SOURCES + "  fp8_pth: fp8", UnknownKeyError, 4, "did you mean 'fp8_path'"),
        (SOURCES + "  weight_maping: {}", UnknownKeyError, 4, "did you mean 'weight_mapping'"),
        (SOURCES + "  sources: {a: b}", UnknownKeyError, 4, "unknown key"),
        (SOURCES + "inference:\n  dtype: bfloat16\n  max_seq_len: 3", UnknownKeyError, 6, "'max_seq_length'"),
        (SOURCES + "server: {hosts: a}", UnknownKeyError, 4, "did you mean 'host'"),
        (SOURCES + "inference: {max_seq_length: '4096'}", MapSyntaxError, 4, "max_seq_length"),
        (SOURCES + "inference: {max_seq_length: 0}", MapSyntaxError, 4, "greater than or equal to 1"),
        (SOURCES + "inference: {dtype: int4}", MapSyntaxError, 4, "'bfloat16'"),
        (SOURCES + "server:\n  port: 99999", MapSyntaxError, 5, "less than or equal to 65535"),
        (SOURCES + "server:\n  port: true", MapSyntaxError, 5, "port"),
        (SOURCES + "  default: int4", UnknownSourceError, 4, "unknown source 'int4'"),
        (SOURCES + "  weight_mapping:\n    a.b: fp8\n    c.d: fp6", UnknownSourceError, 6, "unknown source 'fp6'"),
        (SOURCES + "  weight_mapping: [a]", MapSyntaxError, 4, "weight_mapping"),
        (SOURCES + "  weight_mapping:\n    a: [fp8]", MapSyntaxError, 5, "weight_mapping.a"),
        (SOURCES + "  weight_mapping:\n    a: fp8\n    3: fp8", MapSyntaxError, 6, "the key 3 is not text"),
        (SOURCES + "  weight_mapping:\n    a.b: fp8\n    a.{b: fp8", PatternError, 6, "a.{b"),
        (SOURCES + "  fp8_path: base", MapSyntaxError, 4, "'fp8_path' stands twice"),
        (SOURCES + "  weight_mapping:\n    a: fp8\n    b: fp8\n    a: fp16", MapSyntaxError, 7, "'a' stands twice"),
        ("x: &a [1]\ny: *a", MapSyntaxError, 2, "alias"),
        ("x: " + "[" * 40 + "]" * 40, MapSyntaxError, 1, "nested too deeply"),
        ("x: !!python/object/apply:os.system [ls]", MapSyntaxError, 1, "os.system"),
        (SOURCES + "  other_path: gone", MissingFileError, 4, "'gone'"),
        (SOURCES + "  other_path: map.yaml", MissingFileError, 4, "a file of that name"),
        (SOURCES + "  other_path: 7", MapSyntaxError, 4, "other_path"),
    ],
)
def test_every_fault_is_one_error_with_its_line(
    folder: Path, text: str, error: type[MixedPrecisionError], line: int | None, says: str
) -> None:
    with pytest.raises(MixedPrecisionError) as caught:
        load(folder, text)
    assert type(caught.value) is error
    assert caught.value.line == line
    assert caught.value.file == str(folder / "map.yaml")
    assert says in str(caught.value)


def test_a_missing_map_and_one_that_is_no_text(folder: Path) -> None:
    with pytest.raises(MissingFileError, match="mixed precision config file does not exist"):
        load_map(folder / "gone.yaml")
    (folder / "map.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(MapSyntaxError, match="UTF-8"):
        load_map(folder / "map.yaml")


def test_a_map_of_hostile_size_is_refused_before_it_is_parsed(folder: Path) -> None:
    with (folder / "map.yaml").open("wb") as stream:
        stream.truncate(1 << 30)
    with pytest.raises(MapSyntaxError, match="too large"):
        load_map(folder / "map.yaml")


def test_a_missing_hub_name_says_how_to_get_it(folder: Path) -> None:
    with pytest.raises(MissingFileError) as caught:
        load(folder, "mixed_precision: {a_path: Org/Name}")
    assert caught.value.remedy and "hf download Org/Name" in caught.value.remedy


def test_errors_cross_processes(folder: Path) -> None:
    with pytest.raises(UnknownKeyError) as caught:
        load(folder, SOURCES + "  fp8_pth: fp8")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
