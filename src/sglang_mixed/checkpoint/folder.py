"""What a checkpoint folder holds: config.json, the index, and which .safetensors files count."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import IndexFileError, MissingFileError
from ..formats.mix import KEY, METHOD
from .json_file import check_fields, read_object
from .opening import is_own_file, readable
from .shard import Shard

INDEX = "model.safetensors.index.json"
#: The one file of a checkpoint without an index; others beside it (adapters, copies) are not the model's.
SINGLE = "model.safetensors"
MAX_CONFIG_BYTES = 16 << 20
#: Some 600,000 tensors.
MAX_INDEX_BYTES = 64 << 20
#: How shards are numbered: `model-00002-of-00007.safetensors`.
_MAX_NAME = 255
_NUMBERED = re.compile(r"(.*)-(\d{1,9})-of-(\d{1,9})\.safetensors")
#: Where AutoGPTQ and AutoAWQ wrote their configs before transformers knew of them.
_OWN_CONFIGS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
#: Weights that a folder may hold instead, none of which is read.
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.ckpt", "*.msgpack", "*.h5")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as it stands."""
    with readable(folder):
        is_folder = folder.is_dir()
    if not is_folder:
        raise MissingFileError("no such checkpoint folder", file=folder, remedy="correct the path of this source")
    file = folder / "config.json"
    if not is_own_file(file):
        raise MissingFileError(
            "the folder has no config.json",
            file=file,
            rule="a source is a Hugging Face checkpoint folder",
            remedy="give the folder that holds config.json, or complete the download",
        )
    config = read_object(file, MAX_CONFIG_BYTES)
    check_fields(file, config)
    return config


def quantization_config(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The quantizer's config, wherever its tool puts it; empty for a checkpoint that is not quantized.

    What an exported mix says of itself comes before what it says to other tools.
    """
    mix = config.get(KEY)
    if isinstance(mix, Mapping) and mix.get("quant_method") == METHOD:
        return dict(mix)
    for section in (config, config.get("text_config")):
        for key in ("quantization_config", "compression_config"):
            if isinstance(section, Mapping) and isinstance(section.get(key), Mapping):
                return dict(section[key])
    for name, method in _OWN_CONFIGS.items():
        if is_own_file(folder / name):
            return {"quant_method": method, **read_object(folder / name, MAX_CONFIG_BYTES)}
    if is_own_file(folder / "hf_quant_config.json"):  # ModelOpt
        quantization = read_object(folder / "hf_quant_config.json", MAX_CONFIG_BYTES).get("quantization")
        return {"quant_method": "modelopt", **(quantization if isinstance(quantization, Mapping) else {})}
    return {}


def read_index(folder: Path) -> dict[str, str] | None:
    """Tensor name -> file name; None where there is no index."""
    file = folder / INDEX
    if not is_own_file(file):
        return None
    weight_map = read_object(file, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise IndexFileError("the index has no weight_map", file=file, rule="weight_map maps tensor to file name")
    return weight_map


def count_tensors(folder: Path, weight_map: Mapping[str, str]) -> Counter[str]:
    """File name -> how many tensors the index says are in it."""
    try:
        counts: Counter[str] = Counter(weight_map.values())
    except TypeError:
        counts = Counter()
    if weight_map and (not counts or any(type(name) is not str for name in counts)):
        tensor, name = next((tensor, name) for tensor, name in weight_map.items() if type(name) is not str)
        raise IndexFileError(
            f"the index maps a tensor to {name!r:.80}",
            file=folder / INDEX,
            tensor=tensor,
            rule="weight_map maps a tensor's name to a file's",
            remedy="write the index again, or download it again",
        )
    return counts


def shard_paths(folder: Path, weight_map: Mapping[str, str] | None, counts: Mapping[str, int]) -> list[Path]:
    """The files to open, sorted by name, each of which exists."""
    if weight_map is None:
        return _unindexed(folder)
    names = sorted(counts)
    for name in names:
        _check_name(folder, name, weight_map)
        if not is_own_file(folder / name):
            raise MissingFileError(
                f"the shard {name} is missing",
                file=folder / name,
                tensor=_first(weight_map, name),
                rule=f"every file that {INDEX} names is in the folder",
                remedy="complete the download, or delete the index if it is another checkpoint's",
            )
    paths = [folder / name for name in names]
    _check_numbers(paths)
    return paths


def check_counts(
    folder: Path, weight_map: Mapping[str, str], counts: Mapping[str, int], shards: Sequence[Shard]
) -> None:
    """Raise IndexFileError where a file holds more or fewer tensors than the index says.

    That is all a checkpoint of 100,000 tensors can afford at once; whoever misses a tensor asks `check_names` why.
    """
    if any(counts[shard.path.name] != len(shard) for shard in shards):
        check_names(folder, weight_map, shards)


def check_names(folder: Path, weight_map: Mapping[str, str], shards: Sequence[Shard]) -> None:
    """Raise IndexFileError unless the index names exactly the tensors of each file."""
    for shard in shards:
        if set(map(weight_map.get, shard.names)) - {shard.path.name}:
            stray = next(name for name in shard.names if weight_map.get(name) != shard.path.name)
            said = weight_map.get(stray)
            raise IndexFileError(
                f"the index says of a tensor of this file: {'nothing' if said is None else 'it is in ' + said}",
                file=shard.path,
                tensor=stray,
                rule=f"{INDEX} names the file of every tensor",
                remedy="the file may be another model's: download the checkpoint again",
            )
    held = {name for shard in shards for name in shard.names}
    for absent in weight_map.keys() - held:
        raise IndexFileError(
            "a tensor of the index is not in its file",
            file=folder / weight_map[absent],
            tensor=absent,
            rule=f"every tensor that {INDEX} names is in the file it says",
            remedy="the file may be another model's: download the checkpoint again",
        )


def _check_name(folder: Path, name: str, weight_map: Mapping[str, str]) -> None:
    plain = PurePosixPath(name).name == name and "\\" not in name and name.isprintable()
    plain = plain and len(name) <= _MAX_NAME
    if not plain or not name.endswith(".safetensors"):
        raise IndexFileError(
            f"the index names the file {name!r}",
            file=folder / INDEX,
            tensor=_first(weight_map, name),
            rule="a shard is a .safetensors file in the checkpoint's own folder",
            remedy="do not use this checkpoint, or write its index again",
        )


def _first(weight_map: Mapping[str, str], file_name: str) -> str:
    return next(tensor for tensor, name in weight_map.items() if name == file_name)


def _unindexed(folder: Path) -> list[Path]:
    if is_own_file(folder / SINGLE):
        return [folder / SINGLE]
    with readable(folder):
        paths = sorted(path for path in folder.glob("*.safetensors") if is_own_file(path))
    # Mistral ships the same weights a second time under names of its own.
    paths = [path for path in paths if not path.name.startswith("consolidated")] or paths
    if not paths:
        others = [path.name for pattern in _OTHER_WEIGHTS for path in folder.glob(pattern)]
        raise MissingFileError(
            "the folder has no .safetensors file" + (f", but {others[0]}" if others else ""),
            file=folder,
            rule="only safetensors is read: other formats run code or have no header to check",
            remedy="convert the checkpoint with save_pretrained(..., safe_serialization=True)"
            if others
            else "complete the download",
        )
    _check_numbers(paths)
    return paths


def _check_numbers(paths: Sequence[Path]) -> None:
    """The files' own numbers tell whether one is missing, from an index too."""
    sets: dict[tuple[str, int], set[int]] = {}
    for path in paths:
        if found := _NUMBERED.fullmatch(path.name):
            sets.setdefault((found[1], int(found[3])), set()).add(int(found[2]))
    for (begin, total), numbers in sets.items():
        first = 0 if 0 in numbers else 1
        absent = next(number for number in range(first, max(numbers) + 2) if number not in numbers)
        if absent != first + total:
            raise MissingFileError(
                f"shard {absent} of the {total} of {begin} is missing",
                file=paths[0].parent,
                rule="every shard of a numbered set is in the folder, and the index names it",
                remedy=f"complete the download, {INDEX} included",
            )
