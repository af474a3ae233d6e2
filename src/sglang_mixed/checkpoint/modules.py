"""A checkpoint's tensors by module, each kind of module held once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NoReturn

from ..errors import HeaderError
from ..formats import TensorInfo
from .shard import Parts, Shard, join

#: Local name -> dtype and shape, of one module.
Tensors = Mapping[str, TensorInfo]


class Modules(Mapping[str, Tensors]):
    """Module name -> its tensors, in the order of the files. Modules of one kind have equal tensors."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.kinds, parts_of_kinds = _group(shards)
        #: Kinds that no module is of are empty.
        self.tensors_of_kinds: list[dict[str, TensorInfo]] = [{} for _ in parts_of_kinds]
        for kind in set(self.kinds.values()):
            parts = _all_parts(kind, parts_of_kinds)
            tensors = self.tensors_of_kinds[kind] = {part.local: part.info for part in parts}
            if len(tensors) < len(parts):
                self._refuse(kind, parts, shards)

    def _refuse(self, kind: int, parts: Parts, shards: Sequence[Shard]) -> NoReturn:
        module = next(module for module, one in self.kinds.items() if one == kind)
        local = next(local for local, count in Counter(part.local for part in parts).items() if count > 1)
        name = join(module, local)
        raise HeaderError(
            "the tensor stands twice",
            file=[shard.path for shard in shards if name in shard.names][-1],
            tensor=name,
            rule="a name stands once",
            remedy="download the file again, or export it again",
        )

    def __getitem__(self, module: str) -> Tensors:
        return self.tensors_of_kinds[self.kinds[module]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.kinds)

    def __len__(self) -> int:
        return len(self.kinds)

    def __contains__(self, module: object) -> bool:
        return module in self.kinds


def _group(shards: Sequence[Shard]) -> tuple[dict[str, int], list[tuple[int, Parts]]]:
    """Walk the runs as an automaton: a module's kind and the next run's parts give the module's new kind.

    A kind is the one before it and these parts.
    """
    kinds: dict[str, int] = {}
    parts_of_kinds: list[tuple[int, Parts]] = [(0, ())]
    #: Kind -> the next run's parts -> kind. The identity is safe as a key: the shards keep them all alive.
    following: list[dict[int, int]] = [{}]
    for shard in shards:
        for module, parts in zip(shard.modules, shard.parts, strict=True):
            before = kinds.get(module, 0)
            kind = following[before].get(id(parts))
            if kind is None:
                kind = following[before][id(parts)] = len(following)
                following.append({})
                parts_of_kinds.append((before, parts))
            kinds[module] = kind
    return kinds, parts_of_kinds


def _all_parts(kind: int, parts_of_kinds: Sequence[tuple[int, Parts]]) -> Parts:
    runs = []
    while kind:
        kind, parts = parts_of_kinds[kind]
        runs.append(parts)
    return tuple(part for parts in reversed(runs) for part in parts)
