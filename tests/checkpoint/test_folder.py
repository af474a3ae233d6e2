"""A checkpoint folder: config, index and shards, and every way in which they contradict each other."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file

from sglang_mixed.checkpoint import open_checkpoint
from sglang_mixed.errors import (
    CheckpointError,
    FormatError,
    HeaderError,
    IndexFileError,
    MissingFileError,
    TruncatedFileError,
)

from ..models import tensors, write

INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write(tmp_path / "model", shards=3)


def edit_index(folder: Path, **changes: str | None) -> None:
    index = json.loads((folder / INDEX).read_text())
    for name, file in changes.items():
        if file is None:
            del index["weight_map"][name]
        else:
            index["weight_map"][name] = file
    (folder / INDEX).write_text(json.dumps(index))


def test_shards_with_an_index_and_a_single_file_are_the_same_model(sharded: Path, tmp_path: Path) -> None:
    single = open_checkpoint(write(tmp_path / "single"))
    many = open_checkpoint(sharded)
    assert len(many.files) == 3 and len(single.files) == 1
    assert set(many.entries) == set(single.entries) == set(tensors())
    assert many.modules.keys() == single.modules.keys()
    assert many.quantization == {}


def test_shards_without_an_index_are_taken_together(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    assert set(open_checkpoint(sharded).entries) == set(tensors())
    save_file({"lm_head.weight": tensors()["lm_head.weight"]}, sharded / "stray.safetensors")
    with pytest.raises(IndexFileError) as caught:
        open_checkpoint(sharded)
    assert caught.value.tensor == "lm_head.weight"


def test_beside_the_one_file_others_are_left_aside(tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    save_file({"lm_head.weight": tensors()["lm_head.weight"]}, folder / "adapter_model.safetensors")
    assert [file.name for file in open_checkpoint(folder).files] == ["model.safetensors"]


def test_mistrals_second_copy_is_left_aside(tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    (folder / "consolidated.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert [file.name for file in open_checkpoint(folder).files] == ["model.safetensors"]


def test_what_is_not_there(sharded: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no such checkpoint folder"):
        open_checkpoint(tmp_path / "gone")
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(MissingFileError) as caught:
        open_checkpoint(sharded)
    assert "model-00002-of-00003.safetensors is missing" in str(caught.value) and caught.value.tensor
    (sharded / "config.json").unlink()
    with pytest.raises(MissingFileError, match=r"config\.json"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("other", ["pytorch_model.bin", "model.pt", "model.gguf"])
def test_formats_that_are_not_safetensors_are_refused_with_the_remedy(tmp_path: Path, other: str) -> None:
    folder = write(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / other)
    with pytest.raises(MissingFileError) as caught:
        open_checkpoint(folder)
    assert other in str(caught.value) and "safe_serialization" in str(caught.value.remedy)


@pytest.mark.parametrize(
    "name",
    ["../other/model.safetensors", "/etc/model.safetensors", "a/b.safetensors", "..\\m.safetensors", "model.bin", ""],
)
def test_an_index_does_not_leave_its_folder(sharded: Path, name: str) -> None:
    edit_index(sharded, **{"lm_head.weight": name})
    with pytest.raises(IndexFileError) as caught:
        open_checkpoint(sharded)
    assert caught.value.tensor == "lm_head.weight"
    assert "own folder" in str(caught.value.rule)


def test_a_weight_of_the_index_that_no_file_holds(sharded: Path) -> None:
    edit_index(sharded, **{"model.ghost.weight": "model-00001-of-00003.safetensors"})
    with pytest.raises(IndexFileError) as caught:
        open_checkpoint(sharded)
    assert caught.value.tensor == "model.ghost.weight"
    assert str(caught.value.file).endswith("model-00001-of-00003.safetensors")


def test_a_weight_in_another_file_than_the_index_says(sharded: Path) -> None:
    edit_index(sharded, **{"model.norm.weight": "model-00001-of-00003.safetensors"})
    with pytest.raises(IndexFileError, match="it is in model-00001"):
        open_checkpoint(sharded)


def test_two_weights_that_the_index_swaps_are_found_where_they_are(sharded: Path) -> None:
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    last, first = "model.norm.weight", "lm_head.weight"
    edit_index(sharded, **{last: weight_map[first], first: weight_map[last]})
    checkpoint = open_checkpoint(sharded)
    assert checkpoint.read_tensor(last).shape == (64,)
    with pytest.raises(IndexFileError, match="it is in"):
        checkpoint.check_index()
    with pytest.raises(IndexFileError):
        checkpoint.locate("model.norm", "weight")


def test_a_weight_that_the_index_does_not_name(sharded: Path) -> None:
    edit_index(sharded, **{"model.norm.weight": None})
    with pytest.raises(IndexFileError) as caught:
        open_checkpoint(sharded)
    assert caught.value.tensor == "model.norm.weight" and "nothing" in str(caught.value)


def test_a_shard_of_another_model(sharded: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other", layers=5, shards=3)
    name = "model-00003-of-00003.safetensors"
    (sharded / name).write_bytes((other / name).read_bytes())
    with pytest.raises(IndexFileError, match="index") as caught:
        open_checkpoint(sharded)
    assert "another model" in str(caught.value.remedy)


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"a": ["b"]}}'])
def test_an_index_that_is_none(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_text(text)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(sharded)
    assert str(caught.value.file).endswith(INDEX)


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00"])
def test_a_config_that_is_none(sharded: Path, text: str) -> None:
    (sharded / "config.json").write_text(text)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(sharded)
    assert str(caught.value.file).endswith("config.json")


def test_a_truncated_shard_is_found_before_anything_is_read(sharded: Path) -> None:
    file = sharded / "model-00002-of-00003.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(TruncatedFileError) as caught:
        open_checkpoint(sharded)
    assert caught.value.file == str(file) and caught.value.tensor


def test_a_quantization_config_of_the_wrong_kind_names_config_json(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", quantization_config={"quant_method": "gptq", "bits": "four", "dynamic": 3})
    with pytest.raises(FormatError) as caught:
        open_checkpoint(folder)
    assert caught.value.file == str(folder / "config.json")


#: File of its own -> what it says of the method without saying it.
METHODS = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}


@pytest.mark.parametrize("place", ["config.json", "text_config", *METHODS])
def test_where_quantizers_put_their_config(tmp_path: Path, place: str) -> None:
    said = {"bits": 4, "group_size": 32}
    changes = {
        "config.json": {"quantization_config": said},
        "text_config": {"text_config": {"quantization_config": said}},
    }
    folder = write(tmp_path / "model", **changes.get(place, {}))
    if place in METHODS:
        nested = {"producer": {}, "quantization": said}
        (folder / place).write_text(json.dumps(nested if place == "hf_quant_config.json" else said))
    found = open_checkpoint(folder).quantization
    assert found.items() >= said.items()
    assert found.get("quant_method") == METHODS.get(place)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_pipe_or_folder_in_place_of_a_file_is_not_waited_for(tmp_path: Path, make: Callable[[Path], None]) -> None:
    folder = write(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    make(folder / "model.safetensors")
    with pytest.raises(MissingFileError):
        open_checkpoint(folder)


def test_a_header_error_names_the_shard(sharded: Path) -> None:
    file = sharded / "model-00001-of-00003.safetensors"
    raw = bytearray(file.read_bytes())
    raw[8] = ord("[")
    file.write_bytes(raw)
    with pytest.raises(HeaderError) as caught:
        open_checkpoint(sharded)
    assert caught.value.file == str(file)
