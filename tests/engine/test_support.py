"""Every row of docs/support.md: model x layout x mix against stock SGLang on the dequantized weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_mixed.plan import Rank, make_plan

from .comparison import BOUND
from .mixes import write_mix
from .reference import References
from .support import LAYOUTS, ROWS, Row, table

DOCUMENT = Path(__file__).parents[2] / "docs" / "support.md"


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """(model, mix) -> its map, written when it is first asked for."""
    folder = tmp_path_factory.mktemp("mixes")
    pairs = dict.fromkeys((row.model, row.mix) for row in ROWS)
    return {pair: write_mix(folder / str(number), *pair) for number, pair in enumerate(pairs)}


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_mix_equals_its_dequantized_model(
    row: Row, maps: dict[tuple[str, str], Path], references: References
) -> None:
    described, layout = maps[row.model, row.mix], LAYOUTS[row.layout]
    compared = references.compare(described, common={"skip_tokenizer_init": True, **layout})
    assert compared.largest_difference <= BOUND
    assert compared.differing_tokens == []
    tp, ep = layout.get("tp_size", 1), layout.get("ep_size", 1)
    plan = make_plan(described)
    reports = compared.memory["tensor_parallel_ranks"] if tp > 1 else [compared.memory]
    assert len(reports) == tp
    for number, report in enumerate(reports):
        assert report["rank"] == {"tp": tp, "ep": ep, "number": number}
        assert report["weight_bytes"] == report["planned_bytes"] == plan.rank(Rank(tp, ep, number)).weight_bytes
        assert report["verification"]["state"] == "verified"
        assert report["verification"]["verified"] == report["verification"]["modules"]


def test_the_document_lists_these_rows() -> None:
    assert DOCUMENT.read_text() == table()
