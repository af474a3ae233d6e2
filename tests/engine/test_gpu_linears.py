"""Split linear layers as a GPU runs them, on CPU tensors: SGLang's own methods and parameters, without its kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_mixed.digests import sha256
from sglang_mixed.engine.layers.split_linear import SplitLinear
from sglang_mixed.engine.layers.stock_methods import StockMethods
from sglang_mixed.engine.loading.file_tensors import FileTensors
from sglang_mixed.errors import UnsupportedError
from sglang_mixed.plan import Plan, Rank, RankPlan, make_plan
from sglang_mixed.stream import ReadLog, stream

from ..models import write_map
from .layers import HIDDEN, WRITERS, fill, loading, write_experts
from .stand_ins import decoded, replace_linear_kernels

PARTS = ("q_proj", "k_proj", "v_proj")
ATTENTION = "model.layers.0.self_attn"
ROWS = 256  # of each part
Mapped = Callable[..., Plan]


pytestmark = pytest.mark.usefixtures("slabs")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("sources")
    return functools.cache(lambda kind: write_experts(folder / kind, kind, intermediate=HIDDEN, experts=1))


@pytest.fixture
def mapped(tmp_path: Path, written: Callable[[str], Path]) -> Mapped:
    """A plan that takes q, k, v (and o) from checkpoints in these formats."""

    def plan(**formats: str) -> Plan:
        kinds = dict.fromkeys(("bf16", *formats.values()))
        names = {kind: f"source_{number}" for number, kind in enumerate(kinds)}
        mapping = {f"{ATTENTION}.{part}_proj": names[kind] for part, kind in formats.items()}
        sources = {names[kind]: written(kind) for kind in kinds}
        return make_plan(write_map(tmp_path, mapping, default="source_0", **sources))

    return plan


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_linear_kernels(monkeypatch.setattr)


def qkv(plan: RankPlan) -> tuple[SplitLinear, torch.nn.Module]:
    layer = torch.nn.Module()
    method = SplitLinear([plan.plan.modules[f"{ATTENTION}.{part}"] for part in PARTS])
    rows = ROWS // plan.rank.tp
    method.create_weights(layer, HIDDEN, [rows] * 3, HIDDEN, 3 * ROWS, torch.float32)
    return method, layer


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize(("tp", "number"), [(1, 0), (2, 1)])
@pytest.mark.parametrize("writer", WRITERS)
def test_sglangs_parameters_hold_the_file_s_weights_before_its_kernels_repack(
    mapped: Mapped, writer: str, tp: int, number: int
) -> None:
    plan = mapped(q=writer, k="bf16", v=writer)
    rank = plan.rank(Rank(tp, 1, number))
    method, layer = fill(rank, lambda: qkv(rank))
    method.process_weights_after_loading(layer)
    assert len(method.runs) == 3
    for part, run in zip(PARTS, method.runs, strict=True):
        module = plan.modules[f"{ATTENTION}.{part}"]
        rows = slice(*rank.parts[module.name].wanted.rows)
        expected = plan.checkpoints[module.source].dequantize(module.name)[rows].double()
        assert torch.allclose(decoded(run), expected, rtol=1e-6, atol=0)


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("writer", [one for one in WRITERS if one != "gptq-act-order"])
def test_a_rank_s_columns_hold_its_columns_of_the_files(mapped: Mapped, writer: str) -> None:
    plan = mapped(o=writer)
    rank, (module,) = plan.rank(Rank(2, 1, 1)), parts(plan.rank(), "o")
    method, layer = SplitLinear([module]), torch.nn.Module()
    fill(rank, lambda: method.create_weights(layer, ROWS // 2, [HIDDEN], ROWS, HIDDEN, torch.float32))
    method.process_weights_after_loading(layer)
    expected = plan.checkpoints[module.source].dequantize(module.name)[:, ROWS // 2 :].double()
    assert torch.allclose(decoded(method.runs[0]), expected, rtol=1e-6, atol=0)


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("writer", WRITERS)
def test_neighbours_that_agree_stay_one_matrix(mapped: Mapped, writer: str) -> None:
    plan = mapped(q="bf16", k=writer, v=writer)
    method, layer = fill(plan.rank(), lambda: qkv(plan.rank()))
    method.process_weights_after_loading(layer)
    kv = 2 * ROWS
    act_order = writer == "gptq-act-order"  # k and v have their own orders
    assert [run.matrix.output_size for run in method.runs] == ([ROWS, ROWS, ROWS] if act_order else [ROWS, kv])
    expected = [plan.checkpoints["source_1"].dequantize(f"{ATTENTION}.{part}") for part in ("k_proj", "v_proj")]
    found = torch.cat([decoded(run) for run in method.runs[1:]])
    assert torch.allclose(found, torch.cat(expected).double(), rtol=1e-6, atol=0)


def test_the_outputs_of_plain_runs_are_the_layer_s(mapped: Mapped) -> None:
    plan = mapped(q="bf16", k="bf16", v="bf16")
    method, layer = fill(plan.rank(), lambda: qkv(plan.rank()))
    method.process_weights_after_loading(layer)
    x, bias = torch.randn(3, 2, HIDDEN), torch.randn(3 * ROWS)
    weight = torch.cat([plan.checkpoints["source_0"].dequantize(f"{ATTENTION}.{part}") for part in PARTS])
    assert torch.allclose(method.apply(layer, x, bias), torch.nn.functional.linear(x, weight, bias), atol=1e-4)


@pytest.mark.parametrize("writer", WRITERS)
def test_what_lies_in_memory_has_the_files_hashes(mapped: Mapped, writer: str) -> None:
    rank = mapped(q=writer, k="bf16", v="int8").rank(Rank(2, 1, 1))
    _, layer = fill(rank, lambda: qkv(rank))
    files = [module for module in layer.modules() if isinstance(module, FileTensors)]
    held = {name: one for one_file in files for name, one in one_file.tensors.items()}
    read = {name: one for name, one in stream(list(rank.reads()), ReadLog()) if name in held}
    assert {name.rpartition(".")[0] for name in held} == {f"{ATTENTION}.{part}" for part in PARTS}
    exact = {name: one for name, one in read.items() if not held[name].is_cast}
    assert {name: sha256(held[name].restore()) for name in exact} == {name: sha256(one) for name, one in exact.items()}
    assert {name for name in held if held[name].is_cast} == {f"{ATTENTION}.k_proj.weight"}  # here in float32


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("writer", WRITERS)
def test_parameters_without_padding_are_the_planned_bytes(mapped: Mapped, writer: str) -> None:
    rank = mapped(q=writer, k=writer, v="int8").rank(Rank(2, 1, 0))
    method, layer = fill(rank, lambda: qkv(rank))
    method.process_weights_after_loading(layer)
    # SGLang's Marlin methods drop these themselves, which the fixture keeps them from.
    implied = ("g_idx", "qzeros") if "act-order" not in writer else ("qzeros",)
    for run in method.runs:
        for name in implied:
            if "asym" not in writer and writer != "awq" and hasattr(run.matrix, name):
                getattr(run.matrix, name).data = torch.empty(0)
        run.note_padding()
    held = sum(one.nbytes for one in layer.parameters()) - sum(run.padding for run in method.runs)
    assert held == sum(rank.module_bytes(f"{ATTENTION}.{part}") for part in PARTS)


def stock(plan: RankPlan) -> StockMethods:
    return StockMethods(plan)


def parts(plan: RankPlan, *names: str) -> list[Any]:
    return [plan.plan.modules[f"{ATTENTION}.{name}_proj"] for name in names]


@pytest.mark.parametrize(
    ("formats", "splits"),
    [
        ({"q": "bf16", "k": "bf16", "v": "bf16"}, False),
        ({"q": "bf16", "k": "bf16", "v": "int8"}, True),
        ({"q": "bf16", "k": "int8", "v": "bf16"}, True),
        ({"q": "gptq", "k": "gptq", "v": "gptq"}, True),
        ({"q": "fp8-inverse", "k": "fp8-inverse", "v": "fp8-inverse"}, True),
    ],
)
def test_all_parts_decide_not_the_first(mapped: Mapped, formats: Mapping[str, str], splits: bool) -> None:
    rank = mapped(**formats).rank()
    with loading(rank):
        method = stock(rank).linear(f"{ATTENTION}.qkv_proj", parts(rank, "q", "k", "v"))
    assert isinstance(method, SplitLinear) == splits


def test_formats_without_a_kernel_are_refused_at_once_and_by_name(mapped: Mapped) -> None:
    rank = mapped(q="packed-24", k="packed-24", v="bf16").rank()
    with pytest.raises(UnsupportedError) as caught:
        stock(rank)
    assert "CT int4 g24" in str(caught.value) and f"{ATTENTION}.k_proj" in str(caught.value)
    assert "Marlin takes groups of 32, 64, 128 or whole rows, not 24" in str(caught.value)
    assert "the Triton kernel takes groups that are multiples of 16 columns, not 24" in str(caught.value)
