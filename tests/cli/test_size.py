"""`sglang-mixed size`: exact bytes of every rank, and the tokens that fit beside the fullest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sglang_mixed.cli.main import app
from sglang_mixed.cli.size import describe
from sglang_mixed.plan import Rank, make_plan

TINY = Path(__file__).parents[2] / "examples" / "tiny"
MAP = TINY / "experts.yaml"
RUNNER = CliRunner()


@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (2, 1), (2, 2), (4, 2)])
def test_bytes_of_every_rank_are_the_sums_of_its_modules(tp: int, ep: int) -> None:
    report, plan = describe(MAP, tp=tp, ep=ep), make_plan(MAP)
    for number, rank in enumerate(report["ranks"]):
        held = plan.rank(Rank(tp, ep, number))
        assert rank["weight_bytes"] == held.weight_bytes
        assert rank["read_bytes"] == sum(read.nbytes for _, _, tensors in held.reads() for read in tensors)
        for group in ("by_format", "by_module_kind"):
            assert sum(total["bytes"] for total in rank[group].values()) == held.weight_bytes
            assert sum(total["modules"] for total in rank[group].values()) == len(held.parts)
    assert report["weight_bytes"] == plan.weight_bytes(tp, ep)


def test_tokens_fill_what_the_fullest_rank_leaves() -> None:
    report = describe(MAP, tp=2, gpu_memory=1, mem_fraction_static=0.5)
    left = 2**29 - report["weight_bytes"]
    assert report["kv_cache"]["bytes"] == left
    assert report["kv_cache"]["tokens"] == left // (2 * 1 * (64 + 64) * 2)
    halved = describe(MAP, tp=2, gpu_memory=1, mem_fraction_static=0.5, kv_cache_dtype="fp8_e4m3")
    assert halved["kv_cache"]["tokens"] == left // (2 * 1 * (64 + 64))


def test_weights_that_do_not_fit_leave_no_token() -> None:
    report = describe(MAP, gpu_memory=0.004, mem_fraction_static=1)
    assert not report["fits"] and report["kv_cache"]["tokens"] == 0
    result = RUNNER.invoke(app, ["size", str(MAP), "--gpu-memory", "0.004", "--mem-fraction-static", "1"])
    assert "the weights do not fit" in result.stdout


def test_the_tables_and_the_json() -> None:
    flags = ["size", str(MAP), "--tp", "2", "--gpu-memory", "24"]
    shown, printed = RUNNER.invoke(app, flags), RUNNER.invoke(app, [*flags, "--json"])
    lines = [line.split() for line in shown.stdout.splitlines()]
    assert ["GPTQ", "int4", "g128", "27", "445.50", "KiB", "1.69", "MiB"] in lines
    assert any(line[:2] == ["experts", "48"] for line in lines)
    assert json.loads(printed.stdout) == describe(MAP, tp=2, gpu_memory=24)


def test_a_checkpoint_alone_is_sized_too() -> None:
    report = describe(TINY / "gptq-int4")
    assert report["weight_bytes"] == make_plan(TINY / "int4.yaml").weight_bytes()


def test_a_cache_dtype_that_is_none_is_one_message() -> None:
    result = RUNNER.invoke(app, ["size", str(MAP), "--kv-cache-dtype", "int3"])
    assert result.exit_code == 1 and "--kv-cache-dtype int3" in result.stderr
