"""Indexes that lead elsewhere or contradict their shards; links; weights in formats that run code."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

from tests.models import write

from sglang_mixed.errors import CheckpointError, IndexFileError, MissingFileError

from .base import INDEX, SINGLE, Attack, edit_index, edit_json, edit_tensors, holding

NORM, HEAD = "model.norm.weight", "lm_head.weight"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def _names(file: Any) -> Any:
    return lambda folder: edit_index(folder, **{NORM: file})


def _both(folder: Path) -> None:
    """A tensor of the second shard stands in the first as well."""
    second = holding(folder, NORM)
    copied: dict[str, Any] = {}
    edit_tensors(second, lambda tensors: copied.update({NORM: tensors[NORM]}))
    edit_tensors(folder / "gptq" / FIRST, lambda tensors: tensors.update(copied))


def _neither(folder: Path) -> None:
    edit_tensors(holding(folder, NORM), lambda tensors: tensors.pop(NORM))


def _swapped(folder: Path) -> None:
    weight_map = json.loads((folder / "gptq" / INDEX).read_text())["weight_map"]
    edit_index(folder, **{NORM: weight_map[HEAD], HEAD: weight_map[NORM]})


def _key_twice(folder: Path) -> None:
    file = folder / "gptq" / INDEX
    file.write_text(file.read_text().replace('{"weight_map": {', f'{{"weight_map": {{"{NORM}": "{FIRST}", ', 1))


def _shard_left_out(folder: Path) -> None:
    file = folder / "gptq" / INDEX
    weight_map = json.loads(file.read_text())["weight_map"]
    edit_json(file, weight_map={name: one for name, one in weight_map.items() if one == FIRST})


def _no_index(folder: Path) -> None:
    (folder / "gptq" / INDEX).unlink()
    (folder / "gptq" / SECOND).unlink()


def _of_another_model(folder: Path) -> None:
    write(folder / "other", "gptq", layers=3, experts=2, shards=2)
    (folder / "gptq" / FIRST).write_bytes((folder / "other" / FIRST).read_bytes())


def _linked(name: str, target: str) -> Any:
    def build(folder: Path) -> None:
        file = folder / name
        (folder / "outside").mkdir()
        moved = folder / "outside" / "moved"
        file.rename(moved)
        file.symlink_to(target if target.startswith("/") else moved)

    return build


def _hub_cache(folder: Path) -> None:
    """Every file a link into `blobs`, as the hub's own client leaves them."""
    for source in ("bf16", "fp8", "gptq"):
        blobs = folder / f"models--org--{source}" / "blobs"
        blobs.mkdir(parents=True)
        for number, file in enumerate(sorted((folder / source).iterdir())):
            file.rename(blobs / f"{number:064}")
            file.symlink_to(os.path.relpath(blobs / f"{number:064}", folder / source))


def _renamed(name: str) -> Any:
    return lambda folder: (folder / "bf16" / SINGLE).rename(folder / "bf16" / name)


def _pickle_beside(folder: Path) -> None:
    (folder / "bf16" / "pytorch_model.bin").write_bytes(pickle.dumps(_Trap(folder / "opened")))


class _Trap:
    """What writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._mark,)


_OWN = "own folder"
ATTACKS = [
    Attack("an index that leads to the folder above", _names("../bf16/model.safetensors"), IndexFileError, _OWN, INDEX, NORM),
    Attack("an absolute path in an index", _names("/etc/passwd"), IndexFileError, _OWN, INDEX, NORM),
    Attack("a folder within the folder", _names("sub/model.safetensors"), IndexFileError, _OWN, INDEX, NORM),
    Attack("a NUL in a shard's name", _names("a\0.safetensors"), IndexFileError, _OWN, INDEX, NORM),
    Attack("a shard's name of 5,000 characters", _names("x" * 5000 + ".safetensors"), IndexFileError, _OWN, INDEX, NORM),
    Attack("half a surrogate pair in a shard's name", _names("\ud800.safetensors"), CheckpointError, "JSON", INDEX),
    Attack("a number in place of a shard's name", _names(5), IndexFileError, "name to a file's", INDEX, NORM),
    Attack("a list in place of a shard's name", _names([FIRST]), IndexFileError, "name to a file's", INDEX, NORM),
    Attack("an index that names a pickle", _names("pytorch_model.bin"), IndexFileError, _OWN, INDEX, NORM),
    Attack("an index without a weight_map", lambda folder: edit_json(folder / "gptq" / INDEX, weight_map=...), IndexFileError, "weight_map maps", INDEX),
    Attack("an index cut short", lambda folder: os.truncate(folder / "gptq" / INDEX, 500), CheckpointError, "JSON", INDEX),
    Attack("an index of 65 MB", lambda folder: os.truncate(folder / "gptq" / INDEX, 65 << 20), CheckpointError, "at most", INDEX),
    Attack("a tensor that the index names twice", _key_twice, CheckpointError, "stands once", INDEX),
    Attack("a shard that is not there", lambda folder: (folder / "gptq" / SECOND).unlink(), MissingFileError, "is in the folder", SECOND),
    Attack("no index, and a shard that is not there", _no_index, MissingFileError, "numbered set", "gptq"),
    Attack("an index that leaves a shard out", _shard_left_out, MissingFileError, "numbered set", "gptq"),
    Attack("a tensor in two shards", _both, IndexFileError, "names the file of every tensor", FIRST, NORM),
    Attack("a tensor in none", _neither, IndexFileError, "in the file it says", SECOND, NORM),
    Attack("two tensors whose shards the index exchanges", _swapped, IndexFileError, "names the file of every tensor"),
    Attack("a shard of another model", _of_another_model, IndexFileError, "names the file of every tensor", FIRST),
    Attack("a shard that is a link out of the folder", _linked("bf16/model.safetensors", ""), CheckpointError, "blob of a hub cache", SINGLE),
    Attack("a shard that is a link to /etc/passwd", _linked("bf16/model.safetensors", "/etc/passwd"), CheckpointError, "blob of a hub cache", SINGLE),
    Attack("a config that is a link to /etc/passwd", _linked("bf16/config.json", "/etc/passwd"), CheckpointError, "blob of a hub cache", "config.json"),
    Attack("a shard that is a link to itself", _linked("bf16/model.safetensors", "/proc/self/cwd/nothing"), MissingFileError, "safetensors", "bf16"),
    Attack("a folder of a hub cache (honest links)", _hub_cache, None, ""),
    Attack("nothing but a pickle (.bin)", _renamed("pytorch_model.bin"), MissingFileError, "formats run code", "bf16"),
    Attack("nothing but a pickle (.pt)", _renamed("model.pt"), MissingFileError, "formats run code", "bf16"),
    Attack("a pickle beside the safetensors file", _pickle_beside, None, ""),
    Attack("a pipe in place of a shard", lambda folder: ((folder / "bf16" / SINGLE).unlink(), os.mkfifo(folder / "bf16" / SINGLE)), MissingFileError, "safetensors", "bf16"),
]  # fmt: skip
