"""Every tensor's place by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from .shard import Entry, Shard


class Entries(Mapping[str, Entry]):
    """Tensor name -> Entry, which is made when it is asked for."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = shards
        self._places = {
            name: (file, place)
            for file, shard in enumerate(shards)
            for name, place in zip(shard.names, shard.places, strict=True)
        }

    def __getitem__(self, name: str) -> Entry:
        file, place = self._places[name]
        return self._shards[file].entry(file, place)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
