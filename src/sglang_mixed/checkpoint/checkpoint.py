"""One checkpoint folder: what it says of itself, and its tensors on demand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import torch

from ..errors import FormatError, IndexFileError, TensorMissingError, nearest
from ..formats import Detector, ModuleFormat, get_format
from .folder import check_index, quantization_config, read_config, read_index, shard_paths
from .header import Entry, Shard, read_header
from .modules import Modules, Tensors
from .pause import collector_paused
from .reading import opened, read_entry


class Entries(Mapping[str, Entry]):
    """Tensor name -> Entry, made when asked for: a large checkpoint has 100,000 tensors and few are looked up."""

    def __init__(self, shards: list[Shard], weight_map: Mapping[str, str]) -> None:
        self._shards, self._weight_map = shards, weight_map
        self._files = {shard.path.name: file for file, shard in enumerate(shards)}

    def __getitem__(self, name: str) -> Entry:
        file = self._files[self._weight_map[name]]
        return self._shards[file].entry(file, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weight_map)

    def __len__(self) -> int:
        return len(self._weight_map)


class Checkpoint:
    """A checkpoint's headers, checked: no tensor byte is read until `read` is called.

    `modules` maps each dotted prefix to its local names and what the header says of them, in the order of the files.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_config(path)
        self.quantization = quantization_config(path, self.config)
        weight_map = read_index(path)
        self.files = tuple(shard_paths(path, weight_map))
        self.shards = [read_header(file) for file in self.files]
        if weight_map is None:
            weight_map = self._map_unindexed()
        else:
            check_index(path, weight_map, self.shards)
        self.modules = Modules(self.shards)
        self.entries = Entries(self.shards, weight_map)
        try:
            self._detect = Detector(self.quantization)
        except FormatError as error:
            error.file = str(path / "config.json")
            raise

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the config and every file's name and header; the weights' own bytes are not in it."""
        total = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for shard in self.shards:
            total.update(shard.path.name.encode() + b"\0" + shard.digest)
        return total.hexdigest()

    def format(self, module: str, tensors: Tensors | None = None) -> ModuleFormat:
        """How a module is stored (or these of its tensors alone); equal modules share one value.

        Raises UnknownFormatError and InconsistentFormatError.
        """
        return self._detect(module, self._module(module) if tensors is None else tensors)

    def read_tensor(self, name: str) -> torch.Tensor:
        """One tensor as stored, read by position."""
        entry = self.entries.get(name)
        if entry is None:
            raise self._missing(name, self.entries)
        path = self.files[entry.file]
        with opened(path) as descriptor:
            return read_entry(descriptor, path, name, entry)

    def read(self, module: str) -> dict[str, torch.Tensor]:
        """A module's tensors as stored, by local name.

        >>> sorted(open_checkpoint("gptq-int4").read("model.layers.0.mlp.experts.0.up_proj"))       # doctest: +SKIP
        ['g_idx', 'qweight', 'qzeros', 'scales']
        """
        return {local: self.read_tensor(join(module, local)) for local in self._module(module)}

    def dequantize(self, module: str) -> torch.Tensor:
        """A module's weight in float32 [out, in], by its format's exact reference."""
        found = self.format(module)
        return get_format(found.name).dequantize(self.read(module), found.parameters, torch.float32)

    def file_of(self, module: str) -> Path:
        """The file that holds a module's first tensor (for messages)."""
        return self.files[self.entries[join(module, next(iter(self._module(module))))].file]

    def _module(self, module: str) -> Tensors:
        tensors = self.modules.get(module)
        if tensors is None:
            raise self._missing(module, self.modules)
        return tensors

    def _missing(self, name: str, known: Mapping[str, object]) -> TensorMissingError:
        near = [one for one in known if one.rpartition(".")[2] == name.rpartition(".")[2]][:1000]
        return TensorMissingError(f"the checkpoint has no {name!r}{nearest(name, near)}", file=self.path, tensor=name)

    def _map_unindexed(self) -> dict[str, str]:
        seen: dict[str, str] = {}
        for shard in self.shards:
            for name in seen.keys() & set(shard.names):
                raise IndexFileError(
                    f"the tensor is in {seen[name]} too, and no index tells which counts",
                    file=shard.path,
                    tensor=name,
                    rule="without model.safetensors.index.json a tensor is in one file",
                    remedy="remove the file that does not belong here, or restore the index",
                )
            seen.update(dict.fromkeys(shard.names, shard.path.name))
        return seen


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a Hugging Face checkpoint folder: config, index and headers, all checked.

    >>> open_checkpoint("/models/Qwen3-30B-A3B-FP8").format("model.layers.0.mlp.experts.0.up_proj")  # doctest: +SKIP
    ModuleFormat(name='fp8', parameters=..., shape=(768, 2048))
    """
    with collector_paused():
        return Checkpoint(Path(path))


def join(module: str, local: str) -> str:
    """The tensor name of a module's local name."""
    return f"{module}.{local}" if module else local
