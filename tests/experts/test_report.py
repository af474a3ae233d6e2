from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sglang_mixed.config import load_map
from sglang_mixed.errors import ExpertCountsError
from sglang_mixed.experts import ExpertCounts, expert_formats, nothing_counted, report
from sglang_mixed.plan import make_plan

from .synthetic import counts

TINY = Path(__file__).parents[2] / "examples" / "tiny"


def test_every_expert_has_the_format_of_the_source_its_map_names() -> None:
    formats = expert_formats(make_plan(TINY / "experts.yaml"), (0, 1), 8)
    found = [[formats.label(row, expert) for expert in range(8)] for row in range(2)]
    hot, cold = ["FP8 128x128"] * 3, ["GPTQ int4 g128"] * 4
    assert found == [[*hot, *cold, "GPTQ int4 g128"], [*hot, *cold, "INT8 channel"]]


def test_an_expert_of_several_formats_names_them_all_and_one_outside_the_plan_none(tmp_path: Path) -> None:
    text = (TINY / "map.yaml").read_text().replace(": bf16", f": {TINY / 'bf16'}")
    for name in ("fp8-block", "gptq-int4"):
        text = text.replace(f": {name}", f": {TINY / name}")
    lines = '    "model.layers.0.mlp.experts.0.down_proj": gptq_int4\n'
    (tmp_path / "map.yaml").write_text(text.replace("  weight_mapping:\n", f"  weight_mapping:\n{lines}"))
    formats = expert_formats(make_plan(tmp_path / "map.yaml"), (0, 9), 9)
    assert formats.label(0, 0) == "GPTQ int4 g128 + FP8 128x128"
    assert formats.label(0, 8) is formats.label(1, 0) is None


def test_a_report_is_plain_json_and_says_what_the_counts_say() -> None:
    one, plan = counts(), make_plan(TINY / "experts.yaml")
    found = json.loads(json.dumps(report(one, expert_formats(plan, (0, 1), 8), plan.map, top=3), allow_nan=False))
    assert found["prefill"] == one.prefill.tolist() and found["decode"] == one.decode.tolist()
    assert np.allclose(found["weights"], one.weights, rtol=1e-5)
    assert [entry["activation_count"] for entry in found["top_experts"]] == sorted(one.total.ravel().tolist())[:-4:-1]
    hottest = found["top_experts"][0]
    assert hottest["share"] == pytest.approx(hottest["activation_count"] / 200)
    assert (
        hottest["format"]
        == found["formats"]["labels"][found["formats"]["cells"][hottest["layer_id"]][hottest["expert_id"]]]
    )
    assert found["map"]["rules"][0] == {"pattern": "model.layers.*.mlp.experts.**", "source": "gptq_int4", "line": 9}
    assert found["map"]["default"] == "fp16"


def test_a_report_of_one_layer_holds_that_layer_only() -> None:
    one = counts(layers=(3, 7, 11))
    found = report(one, layer=7)
    assert found["layers"] == [7] and found["prefill"] == [one.prefill[1].tolist()]
    assert {entry["layer_id"] for entry in found["top_experts"]} == {7}
    assert len(found["balance"]["decode"]["gini"]) == 1
    with pytest.raises(ExpertCountsError, match="layer 4") as caught:
        report(one, layer=4)
    assert caught.value.remedy == "one of: 3, 7, 11"


def test_a_layer_without_tokens_has_no_balance_and_no_top_experts() -> None:
    found = report(ExpertCounts.zeros((0, 1), 4, 2, 1.0))
    assert found["balance"]["total"] == {name: [None, None] for name in ("gini", "top_10_percent", "effective_experts")}
    assert found["top_experts"] == []


@pytest.mark.parametrize("state", ["disabled", "no_experts"])
def test_where_nothing_is_counted_the_map_is_still_told(state: str) -> None:
    found = nothing_counted(state, load_map(TINY / "map.yaml"))
    assert found["state"] == state and found["reason"] and found["map"]["rules"]
