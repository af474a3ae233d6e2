"""One rank of a server: which part of every module it holds, in what format, and what it reads of the files.

SGLang's layout: tp ranks cut attention and dense layers; `ep` groups of tp / ep neighbouring ranks share out the
experts in equal runs, and the ranks of a group cut each of its experts. Data parallelism repeats all of this.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..checkpoint import Ranges, Read, join
from ..errors import ParallelismError
from ..formats import ModuleFormat
from ..formats.slicing import Range, Region, cut, tensor_ranges, whole, widen
from .families import cut_role, expert_of, heads_field, is_key_value, is_vocabulary, num_experts, text_config
from .size import in_16_bits, item_bytes, resident, stored

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


class Group(NamedTuple):
    """Modules of which a rank holds the same part; either all of them are routed experts' or none is.

    Bytes are those of one module. `bias`: the dtype of its bias, None without one.
    """

    part: Part
    bias: str | None
    is_expert: bool
    names: list[str]

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return resident(self.part.format) + _height(self.part) * item_bytes(self.bias)

    @property
    def bf16_bytes(self) -> int:
        """Bytes that the part would take in 16 bits."""
        widened = 2 * math.prod(end - begin for begin, end in self.part.wanted)
        weight = in_16_bits(self.part.format) if self.part.is_exact else widened
        return weight + (2 * _height(self.part) if self.bias else 0)

    @property
    def read_bytes(self) -> int:
        """Bytes to read of the file."""
        return stored(self.part.format) + _height(self.part) * item_bytes(self.bias)


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
        #: What this rank holds, modules of which it holds the same together.
        self.groups = self._group()

    @cached_property
    def parts(self) -> dict[str, Part]:
        """Module -> what this rank holds of it, in the plan's order; other ranks' experts are not in it."""
        return {name: group.part for name, group in self._groups_by_name.items()}

    @cached_property
    def _groups_by_name(self) -> dict[str, Group]:
        found = {name: group for group in self.groups for name in group.names}
        return {name: found[name] for name in self.plan.modules if name in found}

    @property
    def weight_bytes(self) -> int:
        """Bytes that the rank's weights take in memory."""
        return sum(len(group.names) * group.nbytes for group in self.groups)

    @property
    def read_bytes(self) -> int:
        """Bytes that the rank reads of the files."""
        return sum(len(group.names) * group.read_bytes for group in self.groups)

    @property
    def torn(self) -> list[str]:
        """Modules whose part ends inside a block, group or word, so that the rank holds more of them than its share."""
        return [name for name, part in self.parts.items() if not part.is_exact]

    def module_bytes(self, name: str) -> int:
        """Bytes of one module's part, its bias included."""
        return self._groups_by_name[name].nbytes

    def module_bf16_bytes(self, name: str) -> int:
        """Bytes that the part would take in 16 bits."""
        return self._groups_by_name[name].bf16_bytes

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
                    for name, place in zip(shard.names, shard.places, strict=True)
                    if name in table
                ]
                if found:
                    yield source, shard.path, found

    def _group(self) -> list[Group]:
        groups: dict[tuple[str, int, str | None, bool], Group] = {}
        before: str | None = None
        #: Whether the parent is an expert of this rank; None for another rank's expert.
        is_expert: bool | None = False
        for name, _, module_format, _, bias in self.plan.modules.values():
            parent, _, last = name.rpartition(".")
            if parent != before:  # neighbours mostly share theirs
                before, expert = parent, expert_of(parent)
                is_expert = False if expert is None else True if expert[1] in self._experts else None
            if is_expert is None:
                continue
            key = last, id(module_format), bias, is_expert
            group = groups.get(key)
            if group is None:
                group = groups[key] = Group(self._part(name, module_format, is_expert), bias, is_expert, [])
            group.names.append(name)
        return list(groups.values())

    def _part(self, name: str, module_format: ModuleFormat, is_expert: bool) -> Part:
        wanted = self._region(name, module_format, is_expert)
        held = widen(module_format, wanted)
        return Part(wanted, held, cut(module_format, held))

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
