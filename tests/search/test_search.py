"""The search finds the least error within the budget, against every choice there is; its map says the same."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sglang_mixed.config import MixedPrecisionMap
from sglang_mixed.errors import BudgetError
from sglang_mixed.plan import make_plan
from sglang_mixed.plan.candidates import Candidates, find_candidates
from sglang_mixed.search import Budget, Mix, Search, map_text, resolves_to
from sglang_mixed.search.mapping import map_lines

from ..models import Tensors, write

Errors = dict[tuple[str, str], float]
LAYER = "model.layers.0"


def smoothed(tensors: Tensors) -> None:
    tensors[f"{LAYER}.post_attention_layernorm.weight"].mul_(2)


def candidates_of(folder: Path, *, layers: int = 1, experts: int = 2, split: bool = False) -> Candidates:
    """BF16, FP8, and a GPTQ whose first layer's experts are tied by smoothing."""
    sources = {
        kind: write(folder / kind, kind, layers=layers, experts=experts, change=smoothed if kind == "gptq" else None)
        for kind in ("bf16", "fp8", "gptq")
    }
    return find_candidates(MixedPrecisionMap(folder / "sources", sources), split=split)


def random_errors(candidates: Candidates, seed: int) -> Errors:
    draw = np.random.default_rng(seed)
    scale = {"bf16": 0.0, "fp8": 1.0, "gptq": 8.0}
    units = candidates.units.values()
    return {(unit.name, source): scale[source] * draw.lognormal() for unit in units for source in unit.choices}


def allowed(candidates: Candidates, formats: int) -> Iterator[dict[str, str]]:
    """Every choice that keeps ties whole and each group within so many formats."""
    units = list(candidates.units.values())
    for sources in itertools.product(*(unit.choices for unit in units)):
        choice = {unit.name: source for unit, source in zip(units, sources, strict=True)}
        torn = any(len({choice[name] == tie.source for name in tie.units}) > 1 for tie in candidates.ties)
        kinds: dict[str, set[str]] = {}
        for unit in units:
            kinds.setdefault(unit.group or unit.name, set()).add(unit.kind(choice[unit.name]))
        if not torn and max(map(len, kinds.values())) <= formats:
            yield choice


@pytest.mark.parametrize("formats", [1, 2])
@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (2, 2)])
def test_no_choice_within_the_budget_is_better(tmp_path: Path, formats: int, tp: int, ep: int) -> None:
    candidates = candidates_of(tmp_path, experts=4)
    every = [(choice, candidates.with_choice(choice).weight_bytes(tp, ep)) for choice in allowed(candidates, formats)]
    sizes = sorted(size for _, size in every)
    for seed, share in enumerate((0.0, 0.2, 0.5, 0.8)):
        errors, limit = random_errors(candidates, seed), sizes[int(share * (len(sizes) - 1))]
        least = min(sum(errors[pair] for pair in choice.items()) for choice, size in every if size <= limit)
        mix = Search(candidates, errors, Budget(limit, tp, ep), formats).best()
        assert mix.choice in [choice for choice, _ in every]
        assert mix.rank_bytes == candidates.with_choice(mix.choice).weight_bytes(tp, ep) <= limit
        assert mix.bound - 1e-9 <= least <= mix.error + 1e-9
        assert mix.error <= least / (1 - 2.1e-3) + 1e-9


def test_the_fullest_rank_counts(tmp_path: Path) -> None:
    """Two experts a rank: errors that would put both large ones on one rank find room for one on each."""
    candidates = candidates_of(tmp_path, experts=4)
    errors = {
        (name, source): {"bf16": 0.0, "fp8": 1.0, "gptq": 99.0}[source] for name, source in random_errors(candidates, 0)
    }
    for expert in (0, 1):
        errors[f"{LAYER}.mlp.experts.{expert}", "fp8"] = 10.0
    all_fp8 = candidates.with_choice(candidates.uniform("fp8"))
    one_more = candidates.with_choice(candidates.uniform("fp8") | {f"{LAYER}.mlp.experts.0": "bf16"})
    mix = Search(candidates, errors, Budget(one_more.weight_bytes(2, 2), 2, 2)).best()
    large = [name for name, source in mix.choice.items() if ".experts." in name and source == "bf16"]
    assert all_fp8.weight_bytes(2, 2) < one_more.weight_bytes(2, 2)
    assert len({name in (f"{LAYER}.mlp.experts.0", f"{LAYER}.mlp.experts.1") for name in large}) == len(large) == 2


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_any_choice_reads_back_from_its_map(tmp_path: Path, split: bool, seed: int) -> None:
    candidates = candidates_of(tmp_path, layers=3, experts=6, split=split)
    draw = np.random.default_rng(seed)
    choice = {name: str(draw.choice(list(unit.choices))) for name, unit in candidates.units.items()}
    for tie in candidates.ties:
        whole = bool(draw.integers(2))
        for name in tie.units:
            choice[name] = tie.source if whole else str(draw.choice(["bf16", "fp8"]))
    search = Search(candidates, random_errors(candidates, seed), Budget(1 << 40))
    mix = Mix(choice, 1.0, 0, 0.0)
    file = tmp_path / "map.yaml"
    file.write_text(map_text(search, mix, ["made for a test"], tmp_path))
    plan = candidates.with_choice(choice)
    assert make_plan(file).modules == plan.modules
    assert resolves_to(file, plan)
    other = next(
        source
        for source in ("bf16", "fp8")
        if source != choice[f"model.layers.1.mlp.experts.0{'.up_proj' if split else ''}"]
    )
    assert not resolves_to(
        file, candidates.with_choice(choice | {f"model.layers.1.mlp.experts.0{'.up_proj' if split else ''}": other})
    )


def test_a_pattern_too_long_for_a_line_is_cut(tmp_path: Path) -> None:
    candidates = candidates_of(tmp_path, experts=300)
    choice = {name: "fp8" if name.endswith(("1", "3", "4", "7")) else "bf16" for name in candidates.units}
    lines = map_lines(candidates.with_choice(choice))
    assert max(len(line.pattern) for line in lines) < 1000
    search = Search(candidates, random_errors(candidates, 0), Budget(1 << 40))
    file = tmp_path / "map.yaml"
    file.write_text(map_text(search, Mix(choice, 1.0, 0, 0.0), [], tmp_path))
    assert resolves_to(file, candidates.with_choice(choice))


def test_a_budget_below_every_mix_names_the_smallest(tmp_path: Path) -> None:
    candidates = candidates_of(tmp_path)
    smallest = candidates.with_choice(candidates.uniform("gptq")).weight_bytes()
    errors = random_errors(candidates, 0)
    with pytest.raises(BudgetError, match=f"{smallest:,} bytes"):
        Search(candidates, errors, Budget(smallest - 1)).best()
    assert Search(candidates, errors, Budget(smallest)).best().rank_bytes == smallest


def test_the_frontier_falls_from_the_smallest_mix_to_the_base(tmp_path: Path) -> None:
    candidates = candidates_of(tmp_path, experts=4)
    search = Search(candidates, random_errors(candidates, 1), Budget(1 << 40))
    points = search.frontier()
    assert points[0].rank_bytes == candidates.with_choice(candidates.uniform("gptq")).weight_bytes()
    assert points[-1].error == 0
    assert all(one.error >= other.error * 0.98 for one, other in itertools.pairwise(points))
