"""The Plan: module -> source, format and tensors. A frozen value with a JSON form."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoint import Checkpoint, changed, open_checkpoint
from ..config import MixedPrecisionMap
from ..errors import DifferentBaseError, TensorMissingError
from ..formats import ModuleFormat, TensorInfo, from_json, label_of, to_json
from . import size
from .alike import Group, alike
from .rank import ALONE, Rank, RankPlan

_VERSION = 2
#: Source -> file name -> [bytes, time of the last write in ns].
FileTimes = dict[str, dict[str, list[int]]]


class PlannedModule(NamedTuple):
    """One module: its name, its source, how it is stored there, and the local names to read (`bias` included).

    `bias`: the dtype of the bias, None without one (or where the bias is part of a plain module's format).
    """

    name: str
    source: str
    format: ModuleFormat
    tensors: tuple[str, ...]
    bias: str | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """Modules that are alike, for a table: bytes are those in memory, and those that 16 bits would take."""

    modules: str
    source: str
    format: str
    count: int
    nbytes: int
    bf16_bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What every rank needs to know. `base` is the source whose names and shapes are the model's.

    `fingerprint` is SHA-256 over the map's choices and every used source's config and headers. `files` are the size and
    time of the last write (ns) of each source's files on this host.
    """

    map: MixedPrecisionMap
    base: str
    sources: dict[str, Path]
    modules: dict[str, PlannedModule]
    warnings: tuple[str, ...]
    fingerprint: str
    _opened: dict[str, Checkpoint] = field(default_factory=dict, compare=False, repr=False)
    files: FileTimes = field(default_factory=dict, repr=False)

    @property
    def checkpoints(self) -> Mapping[str, Checkpoint]:
        """Every used source, opened; a plan that came as JSON opens them now and must find the same headers."""
        if not self._opened:
            opened = {name: open_checkpoint(path) for name, path in self.sources.items()}
            if fingerprint(self.map, self.base, opened) != self.fingerprint:
                raise DifferentBaseError(
                    "the sources have changed since the plan was made",
                    rule="a plan holds for the very headers it was made from",
                    remedy="make the plan again",
                )
            require_same_files(self.files, opened)
            self._opened.update(opened)
        return self._opened

    def require_unchanged(self) -> None:
        """Raise ChangedFileError if a file of a source was written since its header was read."""
        for checkpoint in self.checkpoints.values():
            checkpoint.require_unchanged()

    def newest_file(self) -> tuple[int, Path]:
        """Time of the last write (ns) of the file that was written last; its size and header are in `fingerprint`."""
        shards = [shard for checkpoint in self.checkpoints.values() for shard in checkpoint.shards]
        return max((shard.stamp.modified, shard.path) for shard in shards)

    def source_of(self, tensor: str) -> str:
        """The source of a full tensor name."""
        module = self.modules.get(tensor.rpartition(".")[0])
        if module is None:
            raise TensorMissingError("the plan does not hold this tensor", tensor=tensor)
        return module.source

    def rank(self, rank: Rank = ALONE) -> RankPlan:
        """What one rank holds and reads. Raises ParallelismError where the model cannot be cut that way."""
        return RankPlan(self, rank)

    def module_bytes(self, module: PlannedModule) -> int:
        """Bytes in memory of one module on one rank that holds all of it."""
        return size.resident(module.format) + bias_bytes(module)

    def module_bf16_bytes(self, module: PlannedModule) -> int:
        """Bytes that 16 bits would take."""
        return size.in_16_bits(module.format) + bias_bytes(module, 2)

    def weight_bytes(self, tp: int = 1, ep: int = 1) -> int:
        """Bytes in memory of the fullest rank. Raises ParallelismError where the model cannot be cut that way."""
        if tp == ep == 1:
            return _total(self.modules.values(), size.resident)
        return max(self.rank(Rank(tp, ep, number)).weight_bytes for number in range(Rank(tp, ep).tp))

    @property
    def file_bytes(self) -> int:
        """Bytes to read from disk."""
        return _total(self.modules.values(), size.stored)

    @property
    def bf16_bytes(self) -> int:
        """Bytes that the whole model would take in 16 bits."""
        return _total(self.modules.values(), size.in_16_bits, 2)

    def rows(self) -> list[Row]:
        """The plan by groups of modules that differ only in their numbers or last names, in a model's order."""
        groups: dict[tuple[str, int, str | None], Group] = {}
        for module in self.modules.values():
            kind = module.source, id(module.format), module.bias
            group = groups.get(kind)
            if group is None:
                label = label_of(module.format)
                sizes = self.module_bytes(module), self.module_bf16_bytes(module)
                group = groups[kind] = Group((module.source, label), sizes, [])
            group.names.append(module.name)
        rows = alike(groups.values())
        return [Row(row.names, row.key[0], row.key[1], row.number, row.sizes[0], row.sizes[1]) for row in rows]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; formats stand once, modules name them by number."""
        formats: dict[ModuleFormat, int] = {}
        modules = [
            [one.name, one.source, formats.setdefault(one.format, len(formats)), list(one.tensors), one.bias]
            for one in self.modules.values()
        ]
        return {
            "version": _VERSION,
            "map": self.map.to_json(),
            "base": self.base,
            "sources": {name: str(path) for name, path in self.sources.items()},
            "formats": [to_json(one) for one in formats],
            "modules": modules,
            "warnings": list(self.warnings),
            "fingerprint": self.fingerprint,
            "files": self.files,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Plan:
        """The plan that `to_json` wrote; its sources are opened when they are first asked for."""
        formats = [from_json(one) for one in value["formats"]]
        modules = {
            name: PlannedModule(name, source, formats[number], tuple(tensors), bias)
            for name, source, number, tensors, bias in value["modules"]
        }
        return cls(
            MixedPrecisionMap.from_json(value["map"]),
            value["base"],
            {name: Path(path) for name, path in value["sources"].items()},
            modules,
            tuple(value["warnings"]),
            value["fingerprint"],
            files=value["files"],
        )


def fingerprint(described: MixedPrecisionMap, base: str, checkpoints: Mapping[str, Checkpoint]) -> str:
    """SHA-256 over what decides a plan, paths left out: nodes may keep the same files in other places."""
    rules = [[rule.pattern, rule.source] for rule in described.rules]
    digests = {name: checkpoint.digest for name, checkpoint in checkpoints.items()}
    facts = json.dumps([_VERSION, described.default, base, rules, digests], sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()


def file_times(checkpoints: Mapping[str, Checkpoint]) -> FileTimes:
    """What `require_same_files` compares later, in another process of this host."""
    return {
        name: {shard.path.name: list(shard.stamp[:2]) for shard in checkpoint.shards}
        for name, checkpoint in checkpoints.items()
    }


def require_same_files(noted: FileTimes, checkpoints: Mapping[str, Checkpoint]) -> None:
    """Raise ChangedFileError for a file that is not as it was noted."""
    found = file_times(checkpoints)
    for source, files in noted.items():
        for name, times in files.items():
            if found.get(source, {}).get(name) != times:
                raise changed(checkpoints[source].path / name)


def bias_bytes(module: PlannedModule, item_bytes: int | None = None) -> int:
    """Bytes of a module's bias, at its own size or another."""
    return module.format.shape[0] * (item_bytes or size.item_bytes(module.bias)) if module.bias else 0


def _total(
    modules: Iterable[PlannedModule], measure: Callable[[ModuleFormat], int], bias_item: int | None = None
) -> int:
    """The sum over modules, each format measured once: modules that are alike share it."""
    known: dict[int, int] = {}
    total = 0
    for module in modules:
        nbytes = known.get(id(module.format))
        if nbytes is None:
            nbytes = known[id(module.format)] = measure(module.format)
        total += nbytes + (bias_bytes(module, bias_item) if module.bias else 0)
    return total


__all__ = ["FileTimes", "Plan", "PlannedModule", "Row", "TensorInfo", "file_times", "fingerprint", "require_same_files"]
