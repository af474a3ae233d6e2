"""One checkpoint folder: what it says of itself, and its tensors on demand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..errors import ChangedFileError, FormatError, IndexFileError, TensorMissingError, nearest
from ..formats import Detector, ModuleFormat, get_format
from .entries import Entries
from .folder import (
    check_counts,
    check_names,
    count_tensors,
    quantization_config,
    read_config,
    read_index,
    shard_paths,
)
from .fused_experts import slice_experts
from .header import read_header
from .modules import Modules, Tensors
from .opening import opened, readable
from .pause import collector_paused
from .reading import Read, read_entry
from .shard import Entry, join
from .step import Step

#: Where nothing is said of single modules.
_NO_RULES: Mapping[str, int] = {}


class Checkpoint:
    """A checkpoint's headers, checked: no tensor byte is read until `read` is called.

    `modules` maps each dotted prefix to its local names and what the header says of them, in the order of the files.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_config(path)
        self.quantization = quantization_config(path, self.config)
        self._index = read_index(path)
        counts = count_tensors(path, self._index or {})
        self.files = tuple(shard_paths(path, self._index, counts))
        #: File -> where something was last found in it: what is asked for next mostly stands behind it.
        self._found: dict[int, int] = {}
        self._numbers = {file.name: number for number, file in enumerate(self.files)}
        first = Step()
        self._headers = self.shards = [read_header(file, first) for file in self.files]
        if self._index is None:
            self._check_collisions()
        else:
            check_counts(path, self._index, counts, self.shards)
        self.modules = Modules(self.shards)
        if sliced := slice_experts(self.config, self.shards, self.modules):
            self.shards, self.modules = sliced, Modules(sliced)
        try:
            self._detect = Detector(self.quantization, self.modules)
            rules = self._detect.rules
            #: Module -> a number (or None) that is equal for modules of which `quantization` says the same.
            self.rule: Callable[[str], int | None] = rules.index if len(rules.configs) > 1 else _NO_RULES.get
        except FormatError as error:
            error.file = str(path / "config.json")
            raise

    @property
    def has_fused_experts(self) -> bool:
        """Whether experts that the files hold in one tensor a layer are modules of their own here."""
        return self.shards is not self._headers

    @cached_property
    def entries(self) -> Entries:
        """Tensor name -> Entry."""
        return Entries(self.shards)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the config, the kinds of modules, and every file's name, size and header."""
        files = [(shard.path.name, shard.stamp.size, shard.stamp.header) for shard in self.shards]
        facts = [self.config, self.quantization, self.modules.tensors_of_kinds, files]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def format(self, module: str, tensors: Tensors | None = None) -> ModuleFormat:
        """How a module is stored (or these of its tensors alone); equal modules share one value.

        Raises UnknownFormatError and InconsistentFormatError.
        """
        return self._detect(module, self._module(module) if tensors is None else tensors)

    def origin(self, module: str) -> tuple[str, Mapping[str, Any]]:
        """The source of an exported mix that a module came from ("" in any other checkpoint), and that one's config."""
        return self._detect.rules.origin(module)

    def read_tensor(self, name: str) -> torch.Tensor:
        """One tensor as stored, read by position."""
        entry = self.entries.get(name)
        if entry is None:
            raise self._missing(name, self.entries)
        path = self.files[entry.file]
        with opened(path) as descriptor:
            return read_entry(descriptor, path, Read(name, entry))

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
        return self.files[self.locate(module, next(iter(self._module(module)))).file]

    def locate(self, module: str, local: str) -> Entry:
        """One tensor's entry, for few of many: `entries` first makes a table of all names."""
        file = (self._index or {}).get(join(module, local))
        for number in range(len(self.files)) if file is None else (self._numbers[file],):
            place = self.shards[number].find(module, local, self._found.get(number, 0))
            if place is not None:
                self._found[number] = place[0]
                return self.shards[number].entry(number, place)
        self.check_index()
        raise self._missing(join(module, local), self.modules)

    def check_index(self) -> None:
        """Raise IndexFileError if the index contradicts the files in any name; `open_checkpoint` compares counts."""
        if self._index is not None:
            check_names(self.path, self._index, self._headers)

    def require_unchanged(self) -> None:
        """Raise ChangedFileError if a file was written since its header was read."""
        for shard in self.shards:
            with readable(shard.path):
                status = shard.path.stat()
            if (status.st_size, status.st_mtime_ns) != shard.stamp[:2]:
                raise changed(shard.path)

    def _module(self, module: str) -> Tensors:
        tensors = self.modules.get(module)
        if tensors is None:
            raise self._missing(module, self.modules)
        return tensors

    def _missing(self, name: str, known: Mapping[str, object]) -> TensorMissingError:
        near = [one for one in known if one.rpartition(".")[2] == name.rpartition(".")[2]][:1000]
        return TensorMissingError(f"the checkpoint has no {name!r}{nearest(name, near)}", file=self.path, tensor=name)

    def _check_collisions(self) -> None:
        seen: dict[str, Path] = {}
        for shard in self.shards if len(self.shards) > 1 else ():
            for name in seen.keys() & set(shard.names):
                raise IndexFileError(
                    f"the tensor is in {seen[name].name} too, and no index tells which counts",
                    file=shard.path,
                    tensor=name,
                    rule="without model.safetensors.index.json a tensor is in one file",
                    remedy="remove the file that does not belong here, or restore the index",
                )
            seen.update(dict.fromkeys(shard.names, shard.path))


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a Hugging Face checkpoint folder: config, index and headers, all checked.

    >>> open_checkpoint("/models/Qwen3-30B-A3B-FP8").format("model.layers.0.mlp.experts.0.up_proj")  # doctest: +SKIP
    ModuleFormat(name='fp8', parameters=..., shape=(768, 2048))
    """
    with collector_paused():
        return Checkpoint(Path(path))


def changed(file: Path) -> ChangedFileError:
    """The error for a file that was written after it was looked at."""
    return ChangedFileError(
        "the file has been written since it was checked",
        file=file,
        rule="size and time of the last write stay as they were until the weights are in memory",
        remedy="wait until nothing writes to the checkpoint, check the map again, and start again",
    )
