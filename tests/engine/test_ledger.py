"""The ledger: nothing missing, nothing in part, nothing twice, nothing left over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_mixed.engine.loading.file_tensors import StockTensor, Whole
from sglang_mixed.engine.loading.intake import Intake
from sglang_mixed.engine.loading.ledger import Ledger, Line
from sglang_mixed.engine.loading.stock import StockParameters
from sglang_mixed.engine.loading.transfer import Transfer
from sglang_mixed.errors import LedgerError
from sglang_mixed.formats import detect
from sglang_mixed.formats.base import TensorInfo
from sglang_mixed.plan import Rank, make_plan
from sglang_mixed.stream import ReadLog, stream

from ..models import write_map
from .layers import PREFIX, loading, write_experts

LINE = Line("model.layers.0.mlp.experts", "w1", 3, "w13_qweight")


def test_a_filled_ledger_closes() -> None:
    ledger = Ledger()
    ledger.expect(LINE, 96)
    ledger.arrive(96, LINE)
    ledger.close()


def test_a_missing_weight_is_listed_with_module_shard_and_expert() -> None:
    ledger = Ledger()
    ledger.expect(LINE, 96)
    expected = r"missing: model\.layers\.0\.mlp\.experts\.w13_qweight shard w1 expert 3: 0 of 96 bytes"
    with pytest.raises(LedgerError, match=expected):
        ledger.close()


def test_a_weight_that_arrives_twice_is_refused() -> None:
    ledger = Ledger()
    ledger.expect(LINE, 96)
    ledger.arrive(96, LINE)
    with pytest.raises(LedgerError, match="arrived twice"):
        ledger.arrive(96, LINE)


@pytest.mark.parametrize("nbytes", [0, 48, 95, 97, 192])
def test_a_weight_that_does_not_fill_its_place_is_refused(nbytes: int) -> None:
    ledger = Ledger()
    ledger.expect(LINE, 96)
    with pytest.raises(LedgerError, match=f"{nbytes} of 96 bytes arrived: {LINE}"):
        ledger.arrive(nbytes, LINE)
    with pytest.raises(LedgerError, match=f"missing: {LINE}"):
        ledger.close()


def test_one_delivery_may_fill_several_places() -> None:
    ledger, up = Ledger(), LINE._replace(shard="w3")
    ledger.expect(LINE, 96)
    ledger.expect(up, 32)
    with pytest.raises(LedgerError, match=f"96 of 128 bytes arrived: {LINE}, {up}"):
        ledger.arrive(96, LINE, up)
    ledger.arrive(128, LINE, up)
    ledger.close()


def whole(parameter: torch.Tensor, weight: torch.Tensor) -> None:
    parameter.data.copy_(weight)


def with_padding(parameter: torch.Tensor, weight: torch.Tensor) -> None:
    parameter.data[:3].copy_(weight[:3])
    parameter.data[3:].fill_(0)


def half(parameter: torch.Tensor, weight: torch.Tensor) -> None:
    parameter.data[:2].copy_(weight[:2])


def one_half_twice(parameter: torch.Tensor, weight: torch.Tensor) -> None:
    for part in weight.chunk(2):
        parameter.data[:2].copy_(part)


def too_much(parameter: torch.Tensor, weight: torch.Tensor) -> None:
    parameter.data.copy_(weight)
    parameter.data[:2].copy_(weight[:2])


def nothing(parameter: torch.Tensor, weight: torch.Tensor) -> None:
    pass


def deliver(loader: Callable[..., None]) -> None:
    """A weight of 4 x 8 BF16, by a loader as SGLang's own layers have one."""
    model, ledger = torch.nn.Sequential(torch.nn.Linear(8, 4, bias=False, dtype=torch.bfloat16)), Ledger()
    parameter: Any = model[0].weight
    parameter.weight_loader = loader
    plain = detect("0", {"weight": TensorInfo("BF16", (4, 8))}, {})
    plan: Any = SimpleNamespace(parts={"0": SimpleNamespace(format=plain)})
    stock = StockParameters(plan, ledger, Transfer())
    stock.watch(model)
    weight = torch.ones(4, 8, dtype=torch.bfloat16)
    stock.give("0.weight", weight)
    parameter.weight_loader(parameter, weight)
    ledger.close()


@pytest.mark.parametrize("loader", [whole, with_padding])
def test_a_parameter_that_its_loader_fills_is_struck_out(loader: Callable[..., None]) -> None:
    deliver(loader)


@pytest.mark.parametrize(("loader", "written"), [(half, 32), (one_half_twice, 32), (too_much, 96), (nothing, 0)])
def test_a_parameter_that_its_loader_fills_in_part_is_refused(loader: Callable[..., None], written: int) -> None:
    with pytest.raises(LedgerError, match=rf"{written} of 64 bytes arrived: 0\.weight"):
        deliver(loader)


@pytest.mark.parametrize("writer", ["bf16", "gptq-asymmetric", "fp8-block"])
def test_half_of_a_tensor_for_a_layer_of_ours_is_refused(tmp_path: Path, writer: str) -> None:
    experts = write_experts(tmp_path / "only", writer, intermediate=128)
    rank = make_plan(write_map(tmp_path, {}, only=experts)).rank(Rank())
    with loading(rank) as current:
        Intake().open([rank.plan.modules[f"{PREFIX}.0.down_proj"]])
        reads = [
            (source, path, [one for one in some if one.name in current.places]) for source, path, some in rank.reads()
        ]
        for name, tensor in stream(reads, ReadLog(), lambda _: None):
            with pytest.raises(LedgerError, match=f"{tensor.nbytes // 2:,} of {tensor.nbytes:,} bytes arrived: {name}"):
                current.deliver(name, tensor[: len(tensor) // 2])


@pytest.mark.parametrize(
    ("index", "meets"),
    [
        ((1, slice(0, 4)), False),
        ((0, slice(4, 8)), False),
        ((0, slice(0, 4)), True),
        ((0, slice(3, 5)), True),
        ((0, slice(None)), True),
    ],
)
def test_two_weights_with_one_place_in_a_parameter_are_refused(index: tuple[int | slice, ...], meets: bool) -> None:
    parameter = torch.nn.Parameter(torch.zeros(2, 8), requires_grad=False)
    whole = Whole(Transfer())
    whole.arrive("first", StockTensor(parameter, (0, slice(0, 4)), (4,), torch.float32))
    second = StockTensor(parameter, index, tuple(parameter[index].shape), torch.float32)
    if not meets:
        whole.arrive("second", second)
        return
    with pytest.raises(LedgerError, match="first and second have one place in the model"):
        whole.arrive("second", second)


def test_a_weight_nothing_waits_for_is_refused() -> None:
    with pytest.raises(LedgerError, match="was not expected"):
        Ledger().arrive(96, LINE)


def test_a_planned_tensor_the_model_ignores_is_listed() -> None:
    with pytest.raises(LedgerError, match=r"used by nothing in the model: lm_head\.weight"):
        Ledger().close(["lm_head.weight"])
