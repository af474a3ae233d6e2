"""Mixed experts as a GPU runs them, on CPU tensors: everything but the kernels' own code.

Where a test's name says stand-in, `stand_ins` takes the place of SGLang's runners and of its repacking for Marlin.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sglang.srt.layers.moe.moe_runner.base import MoeRunnerConfig
from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
from sglang.srt.layers.moe.topk import StandardTopKOutput

from sglang_mixed.digests import sha256
from sglang_mixed.engine.layers.decoded import TRITON
from sglang_mixed.engine.layers.grouped_moe import MixedMoE
from sglang_mixed.engine.loading.file_tensors import FileTensors
from sglang_mixed.engine.loading.transfer import Transfer
from sglang_mixed.engine.names import expert_modules
from sglang_mixed.errors import InvalidValueError, LedgerError
from sglang_mixed.plan import Plan, Rank, RankPlan, make_plan
from sglang_mixed.stream import ReadLog, stream

from ..models import write_map
from .layers import HIDDEN, PREFIX, WRITERS, fill, loading, write_experts
from .stand_ins import replace_expert_kernels

EXPERTS, INTERMEDIATE, TOKENS = 4, 192, 5
Mapped = Callable[..., Plan]


pytestmark = pytest.mark.usefixtures("slabs")


@pytest.fixture(autouse=True)
def in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that mix run on SGLang's kernels, a group a format: by default ours runs them at once."""
    monkeypatch.setenv(TRITON, "needed")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a checkpoint in one format, written once."""
    folder = tmp_path_factory.mktemp("sources")
    return functools.cache(lambda kind: write_experts(folder / kind, kind, intermediate=INTERMEDIATE))


@pytest.fixture
def mapped(tmp_path: Path, written: Callable[[str], Path]) -> Mapped:
    """A plan that takes each expert from a checkpoint in its own format."""

    def plan(formats: Sequence[str], **more: str) -> Plan:
        kinds = dict.fromkeys(("bf16", *formats, *more.values()))
        sources = {f"source_{number}": written(kind) for number, kind in enumerate(kinds)}
        names = dict(zip(kinds, sources, strict=True))
        mapping = {f"{PREFIX}.{expert}.*": names[kind] for expert, kind in enumerate(formats)}
        mapping |= {f"{PREFIX}.{pattern}": names[kind] for pattern, kind in more.items()}
        return make_plan(write_map(tmp_path, mapping, default="source_0", **sources))

    return plan


def local_experts(plan: RankPlan) -> list[Any]:
    modules = plan.plan.modules
    names = [expert_modules(PREFIX, expert, modules) for expert in range(EXPERTS)]
    return [tuple(modules[name] for name in three) for three in names if three[0] in plan.parts]


def build(plan: RankPlan, dtype: torch.dtype = torch.bfloat16) -> tuple[MixedMoE, torch.nn.Module]:
    experts, layer = local_experts(plan), torch.nn.Module()
    method = MixedMoE(PREFIX, experts)
    width = INTERMEDIATE if not experts else experts[0][0].format.shape[0] // plan.rank.expert_tp
    method.create_weights(layer, len(experts), HIDDEN, width, dtype)
    config = MoeRunnerConfig(num_experts=EXPERTS, num_local_experts=len(experts), activation="silu")
    method.create_moe_runner(layer, config)
    return method, layer


def all_files(layer: torch.nn.Module) -> list[FileTensors]:
    return [module for module in layer.modules() if isinstance(module, FileTensors)]


def rank_of(plan: Plan, tp: int = 1, ep: int = 1, number: int = 0) -> RankPlan:
    return plan.rank(Rank(tp, ep, number))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_expert_kernels(monkeypatch.setattr)


def compute(plan: Plan, ids: torch.Tensor, tp: int = 1, ep: int = 1) -> torch.Tensor:
    """The sum over all ranks, each of which sees its own experts' numbers and -1 for others, as SGLang dispatches.

    For float32 activations: 16 bits would round scales and hide what is wrong by little.
    """
    x, weights = inputs()
    total = torch.zeros(TOKENS, HIDDEN, dtype=torch.float64)
    for number in range(tp):
        rank = rank_of(plan, tp, ep, number)
        method, layer = fill(rank, lambda rank=rank: build(rank, torch.float32))
        method.process_weights_after_loading(layer)
        first, local = number // rank.rank.expert_tp * (EXPERTS // ep), EXPERTS // ep
        own = torch.where((ids >= first) & (ids < first + local), ids - first, -1) if ep > 1 else ids
        topk = StandardTopKOutput(weights, own.to(torch.int32), torch.zeros(TOKENS, EXPERTS))
        total += method.apply(layer, StandardDispatchOutput(x, None, topk)).hidden_states
    return total


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(TOKENS, HIDDEN, generator=generator), torch.rand(TOKENS, 2, generator=generator)


def reference(plan: Plan, ids: torch.Tensor) -> torch.Tensor:
    (x, weights), output = inputs(), torch.zeros(TOKENS, HIDDEN, dtype=torch.float64)
    for token, slot in ((ids >= 0).nonzero()).tolist():
        gate, up, down = (
            plan.checkpoints[plan.modules[name].source].dequantize(name).double()
            for name in expert_modules(PREFIX, int(ids[token, slot]), plan.modules)
        )
        hidden = torch.nn.functional.silu(gate @ x[token].double()) * (up @ x[token].double())
        output[token] += weights[token, slot].double() * (down @ hidden)
    return output


IDS = torch.tensor([[0, 1], [2, 3], [3, 0], [1, 2], [2, 0]])


def assert_close(found: torch.Tensor, expected: torch.Tensor, bound: float = 1e-10) -> None:
    error = (found - expected).square().sum(0) / expected.square().sum(0)
    assert error.max() <= bound, f"normalized squared error {error.max():.1e} in the worst column"


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (2, 1), (4, 2)])
@pytest.mark.parametrize("writer", ["bf16", *WRITERS])
def test_an_expert_alone_in_its_format_counts_with_a_stand_in_for_the_kernel(
    mapped: Mapped, writer: str, tp: int, ep: int
) -> None:
    plan = mapped(["bf16", writer, "int8", "bf16"])
    assert_close(compute(plan, IDS, tp, ep), reference(plan, IDS))


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("writer", [one for one in WRITERS if one != "gptq-act-order"])
def test_a_cut_inside_a_block_or_a_group_is_filled_up_with_a_stand_in_for_the_kernel(
    mapped: Mapped, writer: str
) -> None:
    # 192 columns on four ranks: 48 each, in blocks and groups of 64 or 32.
    plan = mapped([writer] * EXPERTS)
    assert_close(compute(plan, IDS, tp=4), reference(plan, IDS))


@pytest.mark.usefixtures("stand_in")
def test_ids_of_minus_one_add_nothing_with_a_stand_in_for_the_kernel(mapped: Mapped) -> None:
    plan = mapped(["gptq", "fp8-block", "bf16", "int8"])
    ids = torch.tensor([[0, -1], [-1, -1], [3, 1], [-1, 2], [2, 3]])
    found = compute(plan, ids)
    assert_close(found, reference(plan, ids))
    assert not found[1].any()


@pytest.mark.usefixtures("stand_in")
def test_two_sources_in_one_format_are_one_group(mapped: Mapped, tmp_path: Path) -> None:
    plan = mapped(["gptq", "bf16", "gptq", "bf16"])
    other = write_experts(tmp_path / "other", "gptq", intermediate=INTERMEDIATE, seed=2)
    sources = {**plan.sources, "other": other}
    mapping = {f"{PREFIX}.0.*": "source_1", f"{PREFIX}.2.*": "other"}
    plan = make_plan(write_map(tmp_path, mapping, default="source_0", **sources))
    method, _ = fill(rank_of(plan), lambda: build(rank_of(plan)))
    assert [group.numbers for group in method.groups] == [[0, 2], [1, 3]]
    assert_close(compute(plan, IDS), reference(plan, IDS))


def test_a_rank_without_an_expert_of_a_format_has_no_group_for_it(mapped: Mapped) -> None:
    plan = mapped(["gptq", "gptq", "int8", "bf16"])
    groups = []
    for number in range(2):
        rank = rank_of(plan, 2, 2, number)
        method, layer = fill(rank, lambda rank=rank: build(rank))
        groups.append([group.formats.gate_up.name for group in method.groups])
        assert layer.ids_in_groups.shape == (len(method.groups), 3)
    assert groups == [["gptq"], ["int8", "plain"]]


@pytest.mark.parametrize(("tp", "ep", "number"), [(1, 1, 0), (4, 2, 3)])
@pytest.mark.parametrize("writer", ["bf16", *WRITERS])
def test_what_lies_in_memory_has_the_files_hashes(mapped: Mapped, writer: str, tp: int, ep: int, number: int) -> None:
    rank = rank_of(mapped(["int8", writer, "bf16", writer]), tp, ep, number)
    _, layer = fill(rank, lambda: build(rank))
    held = {name: one for files in all_files(layer) for name, one in files.tensors.items()}
    read = {name: tensor for name, tensor in stream(list(rank.reads()), ReadLog()) if name.startswith(PREFIX)}
    assert held.keys() == read.keys()
    assert {name: sha256(one.restore()) for name, one in held.items()} == {
        name: sha256(one) for name, one in read.items()
    }


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (4, 1)])
@pytest.mark.parametrize("writer", ["bf16", *WRITERS])
def test_parameters_without_padding_are_the_planned_bytes(mapped: Mapped, writer: str, tp: int, ep: int) -> None:
    rank = rank_of(mapped(["int8", writer, writer, writer]), tp, ep)
    method, layer = fill(rank, lambda: build(rank))
    read = sum(files.held_bytes for files in all_files(layer))
    before = sum(one.nbytes for one in layer.parameters()) - sum(group.padding for group in method.groups)
    assert before == read
    method.process_weights_after_loading(layer)
    held = sum(one.nbytes for one in layer.parameters()) - sum(group.padding for group in method.groups)
    assert held == sum(rank.module_bytes(name) for name in rank.parts if name.startswith(PREFIX))


@pytest.mark.usefixtures("stand_in")
def test_the_files_layout_is_given_up_when_the_kernels_take_over(mapped: Mapped) -> None:
    rank = rank_of(mapped(["gptq", "fp8-block", "bf16", "int8"]))
    method, layer = fill(rank, lambda: build(rank))
    method.process_weights_after_loading(layer)
    for files in all_files(layer):
        assert not list(files.parameters()) and not any(one.parameter.numel() for one in files.tensors.values())


@pytest.mark.usefixtures("stand_in")
def test_swapped_experts_are_noticed_with_a_stand_in_for_the_kernel(mapped: Mapped) -> None:
    plan = mapped(["gptq", "gptq", "bf16", "int8"])
    with pytest.raises(AssertionError, match="normalized squared error"):
        assert_close(compute(plan, torch.where(IDS < 2, 1 - IDS, IDS)), reference(plan, IDS))


def test_a_zero_point_that_the_config_denies_is_refused(mapped: Mapped, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(mapped(["gptq"] * EXPERTS).sources["source_1"], broken)
    tensors = load_file(broken / "model.safetensors")
    tensors[f"{PREFIX}.0.up_proj.qzeros"][0, 0] += 1
    save_file(tensors, broken / "model.safetensors")
    plan = make_plan(write_map(tmp_path, {}, only=broken))
    with pytest.raises(InvalidValueError, match="zero points from 7 to 8"):
        fill(rank_of(plan), lambda: build(rank_of(plan)))


def test_an_expert_that_never_arrives_is_listed(mapped: Mapped) -> None:
    rank = rank_of(mapped(["gptq", "bf16", "int8", "bf16"]))
    with loading(rank) as current:
        current.transfer = Transfer()  # which takes tensors outside of its stream
        build(rank)
        for name, tensor in stream(list(rank.reads()), ReadLog(), current.destination):
            if name in current.places and not name.startswith(f"{PREFIX}.2.down_proj"):
                current.deliver(name, tensor)
        with pytest.raises(LedgerError, match=rf"missing: {PREFIX}.2.down_proj.weight_scale".replace(".", r"\.")):
            current.ledger.close()


def test_marlin_joins_down_in_other_groups_and_with_zero_points(mapped: Mapped) -> None:
    rank = rank_of(mapped(["gptq", "bf16", "bf16", "bf16"], **{"0.down_proj": "awq"}))
    method, _ = fill(rank, lambda: build(rank))
    assert [group.kernel.backend.value for group in method.groups] == ["marlin", "triton"]
