"""The ledger: nothing missing, nothing twice, nothing left over."""

from __future__ import annotations

import pytest

from sglang_mixed.engine.ledger import Ledger, Line
from sglang_mixed.errors import LedgerError

LINE = Line("model.layers.0.mlp.experts", "w1", 3, "w13_qweight")


def test_a_filled_ledger_closes() -> None:
    ledger = Ledger()
    ledger.expect(LINE)
    ledger.arrive(LINE)
    ledger.close()


def test_a_missing_weight_is_listed_with_module_shard_and_expert() -> None:
    ledger = Ledger()
    ledger.expect(LINE)
    with pytest.raises(LedgerError, match=r"missing: model\.layers\.0\.mlp\.experts\.w13_qweight shard w1 expert 3"):
        ledger.close()


def test_a_weight_that_arrives_twice_is_refused() -> None:
    ledger = Ledger()
    ledger.expect(LINE)
    ledger.arrive(LINE)
    with pytest.raises(LedgerError, match="arrived twice"):
        ledger.arrive(LINE)


def test_a_weight_nothing_waits_for_is_refused() -> None:
    with pytest.raises(LedgerError, match="was not expected"):
        Ledger().arrive(LINE)


def test_a_planned_tensor_the_model_ignores_is_listed() -> None:
    with pytest.raises(LedgerError, match=r"used by nothing in the model: lm_head\.weight"):
        Ledger().close(["lm_head.weight"])
