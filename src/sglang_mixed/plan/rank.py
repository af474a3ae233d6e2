"""One rank of a server: which part of every module it holds, in what format, and what it reads of the files.

SGLang's layout: tp ranks cut attention and dense layers; `ep` groups of tp / ep neighbouring ranks share out the
experts in equal runs, and the ranks of a group cut each of its experts. Data parallelism repeats all of this.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..checkpoint import Ranges, Read, join
from ..errors import ParallelismError
from ..formats import ModuleFormat
from ..formats.slicing import Range, Region, cut, tensor_ranges, whole, widen
from .families import cut_role, expert_of, heads_field, is_key_value, is_vocabulary, num_experts, text_config
from .size import in_16_bits, item_bytes, resident

if TYPE_CHECKING:
    from .plan import Plan, PlannedModule

#: SGLang fills a vocabulary up to a multiple of this before it cuts it.
VOCABULARY_UNIT = 64


@dataclass(frozen=True, slots=True)
class Rank:
    """Rank `number` of `tp` tensor-parallel ranks, in one of `ep` expert-parallel groups."""

    tp: int = 1
    ep: int = 1
    number: int = 0

    def __post_init__(self) -> None:
        if self.tp < 1 or self.ep < 1 or self.tp % self.ep:
            raise ParallelismError(
                f"tp {self.tp} with ep {self.ep}", rule="ep divides tp", remedy="change --tp or --ep"
            )
        assert 0 <= self.number < self.tp

    @property
    def expert_tp(self) -> int:
        """Ranks that cut one expert."""
        return self.tp // self.ep


ALONE = Rank()


class Part(NamedTuple):
    """What a rank holds of one module: the region its layer has, that in whole units, and the latter's format."""

    wanted: Region
    held: Region
    format: ModuleFormat

    @property
    def is_exact(self) -> bool:
        """Whether the region ends where blocks, groups and words end."""
        return self.wanted == self.held


class RankPlan:
    """A plan as one rank sees it. Raises ParallelismError where the model cannot be cut that way."""

    def __init__(self, plan: Plan, rank: Rank) -> None:
        self.plan, self.rank = plan, rank
        config = plan.checkpoints[plan.base].config
        self._config = text_config(config)
        experts = num_experts(config)
        if experts % rank.ep:
            raise ParallelismError(
                f"{experts} experts on {rank.ep} ranks",
                rule="ep divides the experts",
                remedy=f"choose --ep of {_divisors(experts, rank.tp)}",
            )
        local = experts // rank.ep
        first = rank.number // rank.expert_tp * local
        self._experts = range(first, first + local)
        #: Module -> what this rank holds of it; other ranks' experts are not in it.
        self.parts = self._all_parts()

    @property
    def weight_bytes(self) -> int:
        """Bytes that the rank's weights take in memory."""
        return sum(self.module_bytes(name) for name in self.parts)

    @property
    def torn(self) -> list[str]:
        """Modules whose part ends inside a block, group or word, so that the rank holds more of them than its share."""
        return [name for name, part in self.parts.items() if not part.is_exact]

    def module_bytes(self, name: str) -> int:
        """Bytes of one module's part, its bias included."""
        return resident(self.parts[name].format) + self.bias_bytes(name)

    def bias_bytes(self, name: str) -> int:
        """Bytes of the bias of one module's part."""
        return _height(self.parts[name]) * item_bytes(self.plan.modules[name].bias)

    def module_bf16_bytes(self, name: str) -> int:
        """Bytes that the part would take in 16 bits."""
        part, module = self.parts[name], self.plan.modules[name]
        widened = 2 * math.prod(end - begin for begin, end in part.wanted)
        return (in_16_bits(part.format) if part.is_exact else widened) + (2 * _height(part) if module.bias else 0)

    def reads(self) -> Iterator[tuple[str, Path, list[Read]]]:
        """(source, file, tensors in the order of the file) of exactly what the rank needs, bytes it lacks left out."""
        wanted: dict[str, dict[str, Ranges | None]] = {}
        for checkpoint in self.plan.checkpoints.values():
            checkpoint.check_index()
        for name, part in self.parts.items():
            module = self.plan.modules[name]
            ranges = _ranges(module, part)
            table = wanted.setdefault(module.source, {})
            table.update([(join(name, local), ranges.get(local)) for local in module.tensors])
        for source, table in wanted.items():
            for file, shard in enumerate(self.plan.checkpoints[source].shards):
                found = [
                    Read(name, shard.entry(file, place), table[name])
                    for place, name in enumerate(shard.names)
                    if name in table
                ]
                if found:
                    yield source, shard.path, found

    def _all_parts(self) -> dict[str, Part]:
        parts: dict[str, Part] = {}
        known: dict[tuple[str, int, bool], Part] = {}
        for module in self.plan.modules.values():
            parent, _, last = module.name.rpartition(".")
            expert = expert_of(parent)
            if expert is not None and expert[1] not in self._experts:
                continue
            key = last, id(module.format), expert is None
            part = known.get(key)
            if part is None:
                part = known[key] = self._part(module, expert is not None)
            parts[module.name] = part
        return parts

    def _part(self, module: PlannedModule, is_expert: bool) -> Part:
        wanted = self._region(module.name, module.format, is_expert)
        held = widen(module.format, wanted)
        return Part(wanted, held, cut(module.format, held))

    def _region(self, name: str, module_format: ModuleFormat, is_expert: bool) -> Region:
        everything, role = whole(module_format.shape), cut_role(name)
        ways = self.rank.expert_tp if is_expert else self.rank.tp
        number = self.rank.number % ways
        if role is None or ways == 1 or len(module_format.shape) > 2:
            return everything
        size = everything.rows[1] if role == "out" else everything.columns[1]
        if is_vocabulary(name):
            return Region(_vocabulary(name, size, number, ways), everything.columns)
        if is_key_value(name):
            heads = int(self._config.get("num_key_value_heads") or ways)
            if heads < ways and ways % heads == 0:
                number, ways = number * heads // ways, heads
        unit = self._head_rows(name, size)
        share, rest = divmod(size // unit, ways)
        if rest:
            what = f"{size // unit} heads" if unit > 1 else f"{size} {'rows' if role == 'out' else 'columns'}"
            raise ParallelismError(
                f"{what} cannot be cut in {ways}",
                tensor=name,
                rule="every rank holds an equal share",
                remedy=f"choose --tp{' / --ep' if is_expert else ''} of {_divisors(size // unit)}",
            )
        cut_range = (number * share * unit, (number + 1) * share * unit)
        return Region(cut_range, everything.columns) if role == "out" else Region(everything.rows, cut_range)

    def _head_rows(self, name: str, size: int) -> int:
        """Rows that are cut only together: those of one attention head."""
        heads = self._config.get(heads_field(name) or "")
        return size // heads if isinstance(heads, int) and heads and size % heads == 0 else 1


def _vocabulary(name: str, size: int, number: int, ways: int) -> Range:
    padded = -(-size // VOCABULARY_UNIT) * VOCABULARY_UNIT
    if padded % ways:
        raise ParallelismError(
            f"a vocabulary of {size}, filled up to {padded}, cannot be cut in {ways}",
            tensor=name,
            rule="every rank holds an equal share",
            remedy=f"choose --tp of {_divisors(padded)}",
        )
    share = padded // ways
    return min(number * share, size), min((number + 1) * share, size)


def _height(part: Part) -> int:
    begin, end = part.wanted.rows
    return end - begin


def _ranges(module: PlannedModule, part: Part) -> Mapping[str, Ranges]:
    """Of each tensor that is not needed whole. A bias is cut with the layer, whatever the units of its weight."""
    everything, found = whole(module.format.shape), dict[str, Ranges]()
    if part.held != everything:
        found |= tensor_ranges(module.format, part.held)
    if "bias" in module.tensors and part.wanted.rows != everything.rows:
        found["bias"] = (part.wanted.rows,)
    return found


def _divisors(size: int, among: int = 64) -> str:
    """The usual rank counts that divide `size` (and `among`)."""
    fitting = [ways for ways in (1, 2, 3, 4, 6, 8, 16, 32, 64) if size and size % ways == 0 and among % ways == 0]
    return ", ".join(map(str, fitting)) or "1"
