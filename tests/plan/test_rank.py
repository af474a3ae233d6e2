"""What each rank holds and reads: all ranks together hold the model once, and no rank more than its units ask for."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from sglang_mixed.errors import ParallelismError
from sglang_mixed.formats import get_format
from sglang_mixed.formats.slicing import Region, whole
from sglang_mixed.plan import Plan, Rank, RankPlan
from sglang_mixed.stream import ReadLog, stream

from .conftest import Mapped

MIX = {"**.self_attn.*_proj": "fp8", "**.layers.0.mlp.experts.**": "gptq", "**.layers.1.mlp.experts.**": "fp8"}
LAYOUTS = [(1, 1), (2, 1), (2, 2), (4, 2), (4, 4), (4, 1)]


@pytest.fixture
def plan(mapped: Mapped) -> Plan:
    return mapped(MIX)


def ranks(plan: Plan, tp: int, ep: int) -> list[RankPlan]:
    return [plan.rank(Rank(tp, ep, number)) for number in range(tp)]


@pytest.mark.parametrize(("tp", "ep"), LAYOUTS)
def test_every_value_of_every_weight_is_on_a_rank(plan: Plan, tp: int, ep: int) -> None:
    found: dict[str, torch.Tensor] = {}
    for rank in ranks(plan, tp, ep):
        for name, part in rank.parts.items():
            shape = plan.modules[name].format.shape
            mask = found.setdefault(name, torch.zeros(whole(shape).rows[1], whole(shape).columns[1], dtype=torch.int))
            mask[slice(*part.wanted.rows), slice(*part.wanted.columns)] += 1
    assert found.keys() == plan.modules.keys()
    for name, mask in found.items():
        assert mask.min() >= 1, name
        if name.endswith(("q_proj", "o_proj", "embed_tokens", "lm_head")) or ".experts." in name:
            assert mask.max() == 1, name


@pytest.mark.parametrize(("tp", "ep"), LAYOUTS)
def test_each_expert_is_on_the_ranks_of_one_group(plan: Plan, tp: int, ep: int) -> None:
    for expert in range(4):
        name = f"model.layers.0.mlp.experts.{expert}.up_proj"
        holders = [rank.rank.number for rank in ranks(plan, tp, ep) if name in rank.parts]
        first = expert * ep // 4 * (tp // ep)
        assert holders == list(range(first, first + tp // ep))


@pytest.mark.parametrize(("tp", "ep"), LAYOUTS)
def test_what_a_rank_reads_decodes_to_its_region(plan: Plan, tp: int, ep: int) -> None:
    for rank in ranks(plan, tp, ep):
        log = ReadLog()
        tensors = dict(stream(list(rank.reads()), log))
        assert log.bytes_read == sum(tensor.nbytes for tensor in tensors.values())
        for name, part in rank.parts.items():
            module = plan.modules[name]
            if module.format.name != "fp8":  # GPTQ's g_idx still counts from the whole weight's first group
                continue
            own = {local: tensors[f"{name}.{local}"] for local in module.tensors}
            decoded = get_format("fp8").dequantize(own, part.format.parameters, torch.float32)
            rows, columns = part.held
            assert torch.equal(decoded, plan.checkpoints[module.source].dequantize(name)[slice(*rows), slice(*columns)])


@pytest.mark.parametrize(("tp", "ep"), [(2, 1), (2, 2), (4, 4)])
def test_ranks_read_hardly_more_than_the_plan(plan: Plan, tp: int, ep: int) -> None:
    reads = [read for rank in ranks(plan, tp, ep) for _, _, found in rank.reads() for read in found]
    replicated = sum(read.nbytes for read in reads if "norm" in read.name or read.name.endswith("mlp.gate.weight"))
    shared = sum(read.nbytes for read in reads if read.name.endswith("g_idx")) if tp > ep else 0
    heads = sum(read.nbytes for read in reads if ".k_proj" in read.name or ".v_proj" in read.name)
    assert sum(read.nbytes for read in reads) <= 1.1 * plan.file_bytes + replicated + shared + heads


def test_a_cut_inside_a_block_is_widened_to_whole_blocks(plan: Plan) -> None:
    # 64 columns in blocks of 32, cut in four: 16 each.
    part = plan.rank(Rank(4, 1, 1)).parts["model.layers.0.self_attn.o_proj"]
    assert part.wanted == Region((0, 64), (16, 32)) and part.held == Region((0, 64), (0, 32))
    assert not part.is_exact and part.format.shape == (64, 32)


def test_more_ranks_than_key_value_heads_share_them(plan: Plan) -> None:
    regions = [rank.parts["model.layers.0.self_attn.k_proj"].wanted.rows for rank in ranks(plan, 4, 1)]
    assert regions == [(0, 16), (0, 16), (16, 32), (16, 32)]


def test_a_vocabulary_is_cut_as_sglang_fills_it_up(mapped: Mapped) -> None:
    # 96 rows, filled up to 128.
    assert [one.parts["lm_head"].wanted.rows for one in ranks(mapped({}), 2, 1)] == [(0, 64), (64, 96)]
    assert [one.parts["lm_head"].wanted.rows for one in ranks(mapped({}), 4, 1)][2:] == [(64, 96), (96, 96)]


@pytest.mark.parametrize(
    ("tp", "ep", "what", "remedy"),
    [
        (3, 1, "cannot be cut in 3", "1, 2, 4"),
        (8, 8, "4 experts on 8 ranks", "1, 2, 4"),
        (2, 3, "ep 3", "change --tp or --ep"),
        (8, 1, "4 heads cannot be cut in 8", "1, 2, 4"),
    ],
)
def test_a_layout_that_cannot_be_says_which_can(plan: Plan, tp: int, ep: int, what: str, remedy: str) -> None:
    with pytest.raises(ParallelismError, match=what) as caught:
        plan.weight_bytes(tp, ep)
    assert remedy in str(caught.value.remedy)


def test_bytes_of_ranks_add_up_to_the_model_but_for_what_all_hold(mapped: Mapped) -> None:
    plan = mapped({})
    size = {name: plan.module_bytes(module) for name, module in plan.modules.items()}
    everywhere = sum(size[name] for name in size if name.endswith(("norm", "mlp.gate")))
    for tp, ep in ((2, 1), (2, 2)):
        assert sum(rank.weight_bytes for rank in ranks(plan, tp, ep)) == sum(size.values()) + (tp - 1) * everywhere
    assert plan.weight_bytes(2) == max(rank.weight_bytes for rank in ranks(plan, 2, 1))


def test_the_bytes_16_bits_would_take_are_of_the_wanted_region(plan: Plan) -> None:
    rank = plan.rank(Rank(4, 1, 1))
    assert rank.module_bf16_bytes("model.layers.0.self_attn.o_proj") == 2 * math.prod((64, 16))


def test_two_ranks_of_the_tiny_model_cut_every_format(tmp_path: Path) -> None:
    from sglang_mixed.plan import make_plan

    plan = make_plan(Path(__file__).parents[2] / "examples" / "tiny" / "map.yaml")
    assert all(part.is_exact for rank in ranks(plan, 2, 1) for part in rank.parts.values())
