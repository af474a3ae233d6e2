"""What holds for every map, plan, layout and error, tried on drawn ones."""

from __future__ import annotations

import json
import pickle
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sglang_mixed.config import MixedPrecisionMap, load_map
from sglang_mixed.errors import MixedPrecisionError
from sglang_mixed.formats.slicing import whole
from sglang_mixed.plan import Plan, Rank, make_plan
from sglang_mixed.stream import ReadLog, stream

from ..models import write, write_map
from .drawn import NAME, PROPERTY, matched


@pytest.fixture(scope="module")
def sources() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        yield {kind: write(Path(folder) / kind, kind) for kind in ("bf16", "fp8", "gptq")}


PATTERNS = (
    "model.layers.*.mlp.experts.**", "model.layers.0.**.*_proj", "**.q_proj", "model.layers.{0..1}.self_attn.*_proj",
    "**.experts.{0,2}.up_proj", "model.layers.1.mlp.experts.3.down_proj.weight", "**.self_attn.o_proj.weight",
)  # fmt: skip
MAPPINGS = st.dictionaries(st.sampled_from(PATTERNS), st.sampled_from(("bf16", "fp8", "gptq")), max_size=5)


@PROPERTY
@given(MAPPINGS)
def test_a_map_is_its_json_and_its_yaml(folder: Path, sources: dict[str, Path], mapping: dict[str, str]) -> None:
    parsed = load_map(write_map(folder, mapping, **sources))
    assert MixedPrecisionMap.from_json(json.loads(json.dumps(parsed.to_json()))) == parsed
    section = {f"{name}_path": str(path) for name, path in parsed.sources.items()}
    section["weight_mapping"] = {rule.pattern: rule.source for rule in parsed.rules}  # type: ignore[assignment]
    (folder / "again.yaml").write_text(yaml.safe_dump({"mixed_precision": section}, sort_keys=False))
    again = load_map(folder / "again.yaml")
    assert [rule[:2] for rule in again.rules] == [rule[:2] for rule in parsed.rules]
    assert again.sources == parsed.sources


@PROPERTY
@given(MAPPINGS)
def test_the_last_glob_or_an_exact_name_decides(
    folder: Path, sources: dict[str, Path], mapping: dict[str, str]
) -> None:
    plan = make_plan(write_map(folder, mapping, **sources))
    ordered = sorted(mapping.items(), key=lambda item: "*" not in item[0] and "{" not in item[0])
    for module, planned in plan.modules.items():
        chosen = [source for pattern, source in ordered if matched(pattern, [module])]
        assert planned.source == (chosen[-1] if chosen else "bf16")


@PROPERTY
@given(MAPPINGS)
def test_a_plan_is_its_json(folder: Path, sources: dict[str, Path], mapping: dict[str, str]) -> None:
    plan = make_plan(write_map(folder, mapping, **sources))
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan and again.rank().weight_bytes == plan.rank().weight_bytes
    assert make_plan(plan.map).fingerprint == plan.fingerprint


@PROPERTY
@given(MAPPINGS)
def test_planned_bytes_are_the_bytes_that_are_read(
    folder: Path, sources: dict[str, Path], mapping: dict[str, str]
) -> None:
    plan, log = make_plan(write_map(folder, mapping, **sources)), ReadLog()
    found = dict(stream(plan.rank().reads(), log))
    assert log.bytes_read == plan.file_bytes == sum(tensor.nbytes for tensor in found.values())
    assert set(found) == {f"{one.name}.{local}" for one in plan.modules.values() for local in one.tensors}


LAYOUTS = st.sampled_from(((1, 1), (2, 1), (2, 2), (4, 2), (4, 4)))


@PROPERTY
@given(MAPPINGS, LAYOUTS)
def test_every_expert_is_on_one_group_of_ranks(
    folder: Path, sources: dict[str, Path], mapping: dict[str, str], layout: tuple[int, int]
) -> None:
    plan, (tp, ep) = make_plan(write_map(folder, mapping, **sources)), layout
    ranks = [plan.rank(Rank(tp, ep, number)) for number in range(tp)]
    for module in plan.modules:
        holders = {number // (tp // ep) for number, rank in enumerate(ranks) if module in rank.parts}
        assert len(holders) == (1 if ".experts." in module else ep)


@PROPERTY
@given(MAPPINGS, LAYOUTS)
def test_ranks_that_cut_a_weight_hold_all_of_it(
    folder: Path, sources: dict[str, Path], mapping: dict[str, str], layout: tuple[int, int]
) -> None:
    plan = make_plan(write_map(folder, mapping, **sources))
    ranks = [plan.rank(Rank(*layout, number)) for number in range(layout[0])]
    for name, module in plan.modules.items():
        rows, columns = whole(module.format.shape)
        parts = [rank.parts[name].wanted for rank in ranks if name in rank.parts]
        assert {row for part in parts for row in range(*part.rows)} == set(range(*rows))
        assert {column for part in parts for column in range(*part.columns)} == set(range(*columns))


@PROPERTY
@given(MAPPINGS, LAYOUTS)
def test_no_rank_holds_more_than_one_that_is_alone(
    folder: Path, sources: dict[str, Path], mapping: dict[str, str], layout: tuple[int, int]
) -> None:
    plan = make_plan(write_map(folder, mapping, **sources))
    each = [plan.rank(Rank(*layout, number)).weight_bytes for number in range(layout[0])]
    assert max(each) == plan.weight_bytes(*layout) <= plan.weight_bytes() <= sum(each)


# Errors

ERROR_TYPES = [MixedPrecisionError]
for error_type in ERROR_TYPES:
    ERROR_TYPES += error_type.__subclasses__()


@PROPERTY
@given(st.sampled_from(ERROR_TYPES), st.text(min_size=1), st.none() | NAME, st.none() | st.integers(1, 99))
def test_an_error_is_the_same_in_another_process(
    kind: type[MixedPrecisionError], what: str, tensor: str | None, line: int | None
) -> None:
    error = kind(what, file="a/b", tensor=tensor, line=line, rule="r", remedy="m")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind and str(again) == str(error) and vars(again) == vars(error)
