"""What a map could choose: for each module the sources that may give it, and what has to be chosen together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from ..checkpoint import Checkpoint, open_checkpoint
from ..checkpoint.pause import collector_paused
from ..config import MixedPrecisionMap, Rule
from ..errors import CoverageError
from ..formats import get_format, label_of
from .cover import cover
from .families import expert_of, fused_matrices, norm_readers, runs_in_16_bits
from .fused import running_together
from .make import make_plan
from .plan import Plan, PlannedModule
from .resolve import Assignment, assign, default_source
from .same_base import check_configs, compare_weights, different_base


@dataclass(frozen=True, slots=True)
class Unit:
    """Modules that come from one source: an expert, a fused matrix, or one module.

    `group`: the units among which formats are counted, because each format of a group is a kernel launch; None for
    a unit that runs alone. `choices`: source -> its modules there.
    """

    name: str
    group: str | None
    choices: Mapping[str, tuple[PlannedModule, ...]]

    @property
    def modules(self) -> tuple[str, ...]:
        """The names of the modules."""
        return tuple(module.name for module in next(iter(self.choices.values())))

    def kind(self, source: str) -> str:
        """What runs the unit if it comes from this source: the labels of its formats."""
        labels = (label_of(one.format) for one in self.choices[source])
        return " + ".join(dict.fromkeys(labels))


@dataclass(frozen=True, slots=True)
class Tie:
    """Smoothing that `source` folded into a norm: all of `units` come from it, and `followers` then, or none."""

    source: str
    units: tuple[str, ...]
    followers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Candidates:
    """Every choice there is. `plan` takes all from the base, the 16-bit source; what is in no unit stays there."""

    plan: Plan
    checkpoints: Mapping[str, Checkpoint]
    units: Mapping[str, Unit]
    ties: tuple[Tie, ...]
    sources: dict[str, dict[str, PlannedModule]] = field(repr=False)

    @property
    def base(self) -> str:
        """The source that everything else is compared with."""
        return self.plan.base

    def with_choice(self, choice: Mapping[str, str]) -> Plan:
        """The plan that takes each unit from its chosen source, and what follows a tie with it.

        Its map says nothing of the choice: bytes and modules are the plan's, the lines are for `search` to write.
        """
        modules = dict(self.plan.modules)
        for name, source in choice.items():
            modules.update((module.name, module) for module in self.units[name].choices[source])
        for name, source in self.followers(choice).items():
            modules[name] = self.sources[source][name]
        used = {module.source for module in modules.values()} | {self.base}
        paths = {name: path for name, path in self.plan.map.sources.items() if name in used}
        opened = {name: self.checkpoints[name] for name in paths}
        return dataclasses.replace(self.plan, modules=modules, sources=paths, _opened=opened)

    def followers(self, choice: Mapping[str, str]) -> dict[str, str]:
        """Norms and routers that a choice takes from another source than the base."""
        return {name: tie.source for tie in self.ties if choice[tie.units[0]] == tie.source for name in tie.followers}

    def dequantize(self, source: str, module: str) -> torch.Tensor:
        """A module's weight as one source holds it, float32 [out, in]."""
        found = self.sources[source][module].format
        stored = self.checkpoints[source].read(module)
        return get_format(found.name).dequantize(stored, found.parameters, torch.float32)

    def uniform(self, source: str) -> dict[str, str]:
        """The choice that takes everything it can from one source."""
        return {name: source if source in unit.choices else self.base for name, unit in self.units.items()}


def find_candidates(described: MixedPrecisionMap, *, split: bool = False) -> Candidates:
    """Open all sources of a map, whose lines are not looked at, and find what each may give.

    The base is the map's default, else the first source that is not quantized. `split` makes every module a unit of
    its own: parts of a fused matrix and of an expert may then differ, which a GPU runs only in part.
    Raises what `make_plan` raises, CoverageError where no source is in 16 bits.
    """
    with collector_paused():
        opened = {name: open_checkpoint(path) for name, path in described.sources.items()}
    base = described.default or _unquantized(opened)
    described = dataclasses.replace(described, rules=(), default=base)
    plan = make_plan(described)
    if not described.allow_different_base:
        check_configs(opened[base].path, opened[base].config, {one.path: one.config for one in opened.values()})
    sources = {name: _modules(name, base, opened, plan) for name in opened}
    others = {name: one for name, one in opened.items() if name != base}
    changed: dict[str, dict[str, list[str]]] = {}
    for name, comparison in compare_weights(opened[base], others).items():
        if comparison.others and not described.allow_different_base:
            raise different_base(name, base, opened[name], comparison)
        changed[name] = {norm: norm_readers(norm, plan.modules) for norm in comparison.norms}
    free = {name: _without_incomplete(sources[name], changed.get(name, {})) for name in sources}
    units = _units(plan.modules, free, split)
    return Candidates(plan, opened, units, tuple(_ties(changed, units, sources)), sources)


def _unquantized(opened: Mapping[str, Checkpoint]) -> str:
    found = next((name for name, one in opened.items() if not one.quantization), None)
    if found is None:
        raise CoverageError(
            "no source is in 16 bits",
            rule="errors are measured against the weights as they were before quantization",
            remedy="add the BF16 checkpoint as a source",
        )
    return found


def _modules(source: str, base: str, opened: Mapping[str, Checkpoint], plan: Plan) -> dict[str, PlannedModule]:
    """What one source may give: all that it holds, but for compressed forms of what the engine reads in 16 bits."""
    if source == base:
        return dict(plan.modules)
    checkpoint, rule = opened[source], Rule("**", source, 0)
    names = assign(plan.map, default_source(plan.map, None), opened[base]).rules
    held = {
        name: rule if name in checkpoint.modules and (not runs_in_16_bits(name) or _plain(checkpoint, name)) else None
        for name in names
    }
    planned, _ = cover(base, {base: opened[base], source: checkpoint}, Assignment(base, held))
    return {name: module for name, module in planned.items() if module.source == source}


def _plain(checkpoint: Checkpoint, name: str) -> bool:
    return checkpoint.format(name).name == "plain"


def _without_incomplete(
    modules: Mapping[str, PlannedModule], changed: Mapping[str, list[str]]
) -> dict[str, PlannedModule]:
    """Without what reads a norm that the source changed and cannot give with all its readers."""
    torn = [names for norm, names in changed.items() if not all(name in modules for name in (norm, *names))]
    lost = {name for names in torn for name in names}
    return {name: module for name, module in modules.items() if name not in lost}


def _units(
    modules: Mapping[str, PlannedModule], sources: Mapping[str, Mapping[str, PlannedModule]], split: bool
) -> dict[str, Unit]:
    members: dict[tuple[str, str | None], list[str]] = {}
    for name, module in modules.items():
        # What is no matrix, such as the sinks of attention, has no other form.
        if not runs_in_16_bits(name) and len(module.format.shape) == 2:
            members.setdefault(_place(name, split), []).append(name)
    units = {}
    for (name, group), names in members.items():
        choices = {
            source: tuple(held[one] for one in names)
            for source, held in sources.items()
            if all(one in held for one in names)
        }
        if len(choices) > 1:
            units[name] = Unit(name, group, choices)
    return units


def _place(name: str, split: bool) -> tuple[str, str | None]:
    """The unit that a module belongs to, and that one's group."""
    parent, _, last = name.rpartition(".")
    if split:
        together = running_together(name)
        return name, ".".join(together) if together else None
    if expert := expert_of(parent):
        return parent, expert[0]
    matrix = fused_matrices(parent).get(last)
    return (f"{parent}.{matrix}" if matrix else name), None


def _ties(
    changed: Mapping[str, Mapping[str, list[str]]],
    units: Mapping[str, Unit],
    sources: Mapping[str, Mapping[str, PlannedModule]],
) -> Iterable[Tie]:
    home = {module: unit.name for unit in units.values() for module in unit.modules}
    for source, norms in changed.items():
        for norm, readers in norms.items():
            tied = dict.fromkeys(home[name] for name in readers if name in home and source in units[home[name]].choices)
            if tied:
                followers = [name for name in (norm, *readers) if name not in home and name in sources[source]]
                yield Tie(source, tuple(tied), tuple(followers))
