"""A checkpoint's tensors by module, each kind of module held once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ..errors import HeaderError
from ..formats import TensorInfo
from .header import Part, Shard

#: Local name -> dtype and shape, of one module.
Tensors = Mapping[str, TensorInfo]


class Modules(Mapping[str, Tensors]):
    """Module name -> its tensors, in the order of the files. Modules with equal tensors have equal `kinds`."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.tensors_of_kinds: list[dict[str, TensorInfo]] = [{}]
        self.kinds = self._group(shards)

    def _group(self, shards: Sequence[Shard]) -> dict[str, int]:
        """Walk the names as an automaton: a module's kind and the next tensor give the module's new kind."""
        kinds: dict[str, int] = {}
        #: Kind -> next tensor's part -> kind. The identity is safe as a key: the shards keep every part alive.
        following: list[dict[int, int]] = [{}]
        for shard in shards:
            for module, part in zip(shard.modules, shard.parts, strict=True):
                before = kinds.get(module, 0)
                kind = following[before].get(id(part))
                if kind is None:
                    kind = following[before][id(part)] = self._extend(before, shard, module, part)
                    following.append({})
                kinds[module] = kind
        return kinds

    def _extend(self, kind: int, shard: Shard, module: str, part: Part) -> int:
        tensors = self.tensors_of_kinds[kind]
        if part.local in tensors:
            # Every module of this kind that met this part so far would have been refused here: this is the first.
            raise HeaderError(
                "the tensor stands twice",
                file=shard.path,
                tensor=f"{module}.{part.local}",
                rule="a name stands once",
                remedy="download the file again, or export it again",
            )
        self.tensors_of_kinds.append({**tensors, part.local: part.info})
        return len(self.tensors_of_kinds) - 1

    def __getitem__(self, module: str) -> Tensors:
        return self.tensors_of_kinds[self.kinds[module]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.kinds)

    def __len__(self) -> int:
        return len(self.kinds)

    def __contains__(self, module: object) -> bool:
        return module in self.kinds
