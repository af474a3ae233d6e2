"""The Plan as a value: JSON, fingerprint, what is read, and sizes to the byte."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from sglang_mixed.errors import DifferentBaseError, TensorMissingError
from sglang_mixed.formats import nbytes
from sglang_mixed.kernels import resident_bytes
from sglang_mixed.plan import Plan, make_plan

from ..models import write, write_map
from .conftest import Mapped

TINY = Path(__file__).parents[2] / "examples" / "tiny"
MIX = {"**.self_attn.*_proj": "fp8", "**.layers.0.mlp.experts.**": "gptq", "**.layers.1.mlp.experts.**": "fp8"}


@pytest.fixture
def plan(mapped: Mapped) -> Plan:
    return mapped(MIX)


def test_json_keeps_everything(plan: Plan) -> None:
    found = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert found == plan
    assert found.weight_bytes() == plan.weight_bytes() and found.rows() == plan.rows()
    assert list(found.rank().reads()) == list(plan.rank().reads())


def test_a_plan_from_json_refuses_sources_that_have_changed(plan: Plan, tmp_path: Path) -> None:
    value = json.loads(json.dumps(plan.to_json()))
    write(tmp_path / "fp8", "fp8", layers=3)
    with pytest.raises(DifferentBaseError, match="changed since"):
        list(Plan.from_json(value).rank().reads())


def test_the_fingerprint_sees_choices_and_headers_but_no_paths(mapped: Mapped, plan: Plan, tmp_path: Path) -> None:
    assert mapped(MIX).fingerprint == plan.fingerprint
    assert mapped(MIX, fp8=write(tmp_path / "elsewhere", "fp8")).fingerprint == plan.fingerprint
    assert mapped({**MIX, "lm_head": "fp8"}).fingerprint != plan.fingerprint
    assert mapped(MIX, fp8=write(tmp_path / "other", "fp8", max_position_embeddings=5)).fingerprint != plan.fingerprint


def test_reads_are_exactly_the_planned_tensors_in_file_order(plan: Plan, mapped: Mapped, tmp_path: Path) -> None:
    plan = mapped(MIX, fp8=write(tmp_path / "sharded", "fp8", shards=3))
    reads = list(plan.rank().reads())
    names = [read.name for _, _, tensors in reads for read in tensors]
    assert sorted(names) == sorted(f"{one.name}.{local}" for one in plan.modules.values() for local in one.tensors)
    assert len({path for _, path, _ in reads}) == len(reads) == 4  # one shard holds nothing that is planned
    for source, path, tensors in reads:
        assert path.parent == plan.sources[source]
        assert all(plan.source_of(read.name) == source for read in tensors)
        begins = [read.entry.begin for read in tensors]
        assert begins == sorted(begins)
    assert sum(read.nbytes for _, _, tensors in reads for read in tensors) == plan.file_bytes


def test_bytes_are_the_sum_of_the_modules(plan: Plan) -> None:
    formats = [module.format for module in plan.modules.values()]
    assert plan.weight_bytes() == sum(map(resident_bytes, formats)) == plan.weight_bytes(1, 1)
    assert plan.file_bytes == sum(map(nbytes, formats))
    assert plan.bf16_bytes == sum(2 * math.prod(one.shape) for one in formats)
    rows = plan.rows()
    assert sum(row.nbytes for row in rows) == plan.weight_bytes()
    assert sum(row.bf16_bytes for row in rows) == plan.bf16_bytes
    assert sum(row.count for row in rows) == len(plan.modules)


def test_rows_fold_layers_experts_and_siblings(plan: Plan) -> None:
    rows = {(row.modules, row.source, row.format): row.count for row in plan.rows()}
    assert rows["model.layers.0.mlp.experts.*.{down_proj,gate_proj,up_proj}", "gptq", "GPTQ int4 g32"] == 12
    assert rows["model.layers.*.self_attn.{k_proj,o_proj,q_proj,v_proj}", "fp8", "FP8 32x32"] == 8
    names = [row.modules for row in plan.rows()]
    assert (names[0], names[-1]) == ("model.embed_tokens", "lm_head")


def test_a_tensor_that_is_not_planned_has_no_source(plan: Plan) -> None:
    with pytest.raises(TensorMissingError):
        plan.source_of("model.ghost.weight")


def test_expert_ranks_that_hold_unequal_bytes_count_by_the_fullest(tmp_path: Path, mapped: Mapped) -> None:
    plan = mapped({})
    small = plan.modules["model.layers.0.mlp.experts.3.up_proj"]
    halved = small._replace(format=plan.modules["model.layers.0.self_attn.q_proj"].format)
    changed = {**plan.modules, small.name: halved}
    lighter = Plan(plan.map, plan.base, plan.sources, changed, (), plan.fingerprint, dict(plan.checkpoints))
    assert lighter.weight_bytes(2, 2) == plan.weight_bytes(2, 2)
    assert lighter.weight_bytes() < plan.weight_bytes()


@pytest.mark.parametrize("name", ["map.yaml", "int4.yaml"])
def test_the_examples_make_a_plan(name: str) -> None:
    plan = make_plan(TINY / name, base=TINY / "bf16")
    assert plan.base == "fp16" and plan.warnings == ()
    assert plan.weight_bytes() < 0.6 * plan.bf16_bytes
    assert plan.file_bytes < 1.1 * plan.weight_bytes()


def test_every_quantized_example_mixes_with_every_other(tmp_path: Path) -> None:
    names = ("fp8-block", "fp8-channel", "int8", "gptq-int4")
    for experts in names:
        for attention in names:
            file = write_map(
                tmp_path, {"**.experts.**": "e", "**.self_attn.*_proj": "a"},
                base=TINY / "bf16", e=TINY / experts, a=TINY / attention,
            )  # fmt: skip
            assert len(make_plan(file).modules) == 69
