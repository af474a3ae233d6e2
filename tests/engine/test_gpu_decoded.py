"""What SGLang has no kernel for, on a GPU: our layers on CPU tensors, with their real Triton kernels, interpreted."""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_mixed.engine.layers import decoded
from sglang_mixed.engine.layers.grouped_moe import share_out
from sglang_mixed.engine.names import expert_modules
from sglang_mixed.errors import EngineError, UnsupportedError
from sglang_mixed.plan import make_plan

from ..models import write_map
from . import decoded_checks
from .family_models import write_family
from .layers import PREFIX, WRITERS, loading, write_experts
from .mixes import SOURCES
from .test_fused_experts import MIX, write_hub

EXPERTS, INTERMEDIATE = 4, 192
ATTENTION = "model.layers.0.self_attn"
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[..., Any]]:
    """Start a function of `decoded_checks` in a process where Triton interprets its kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        pool.submit(os.getpid).result()
    with pool:
        yield pool.submit


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """A map over checkpoints of single layers, each in one format and written once: pattern -> format."""
    folder = tmp_path_factory.mktemp("sources")
    written = functools.cache(lambda kind: write_experts(folder / kind, kind, intermediate=INTERMEDIATE))

    def write(mapping: Mapping[str, str]) -> Path:
        kinds = dict.fromkeys(("bf16", *mapping.values()))
        names = {kind: f"source_{number}" for number, kind in enumerate(kinds)}
        patterns = {pattern: names[kind] for pattern, kind in mapping.items()}
        sources = {name: written(kind) for kind, name in names.items()}
        return write_map(tmp_path_factory.mktemp("map"), patterns, default="source_0", **sources)

    return write


def experts(formats: Mapping[str, str]) -> dict[str, str]:
    return {f"{PREFIX}.{pattern}": kind for pattern, kind in formats.items()}


@pytest.fixture(scope="module")
def layers(run: Any, write: Write, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The running checks of MoE layers."""
    kinds = ["gptq-3-bit", "awq-32", *WRITERS]
    turns = {f"{n // 3}.{('gate', 'up', 'down')[n % 3]}_proj": kinds[n % len(kinds)] for n in range(12)}
    others = {f"{n // 3}.{('gate', 'up', 'down')[n % 3]}_proj": kinds[(n + 7) % len(kinds)] for n in range(12)}
    one = write(experts({"0.up_proj": "fp8-block", "1.down_proj": "awq", "3.*": "awq-32"}))
    hub = tmp_path_factory.mktemp("gpt-oss")
    write_hub(hub / "hub")
    write_family(hub / "gptq", "gpt_oss", *SOURCES["gptq"])
    (hub / "map.yaml").write_text(MIX)
    swiglu = {"gemm1_alpha": 1.702, "gemm1_clamp_limit": 7.0, "routed_scaling_factor": 2.5}
    check = decoded_checks.experts
    return {
        "an expert's parts differ": run(check, one),
        "every matrix differs": run(check, write(experts(turns))),
        "cut inside of units": run(check, write(experts(turns)), tp=4),
        "over ranks": run(check, write(experts(others)), tp=2, ep=2),
        "gpt-oss": run(check, hub / "map.yaml", **swiglu),
        "gpt-oss over ranks": run(check, hub / "map.yaml", tp=2, **swiglu),
    }


LAYERS = ("an expert's parts differ", "every matrix differs", "cut inside of units", "over ranks", "gpt-oss")


@pytest.mark.parametrize("name", [*LAYERS, "gpt-oss over ranks"])
def test_experts_that_no_kernel_of_sglang_runs_compute_what_they_must(layers: Any, name: str) -> None:
    assert layers[name].result()["error"] <= 1e-10


@pytest.mark.parametrize("name", [*LAYERS, "gpt-oss over ranks"])
def test_memory_without_padding_is_the_planned_bytes(layers: Any, name: str) -> None:
    for rank in layers[name].result()["ranks"]:
        assert rank["held"] == rank["planned"]


def test_all_that_no_kernel_of_sglang_runs_is_one_group(layers: Any) -> None:
    for name in LAYERS[1:]:
        assert {kind for rank in layers[name].result()["ranks"] for kind in rank["kinds"]} == {"DecodedExperts"}


@pytest.fixture(scope="module")
def linears(run: Any, write: Write) -> dict[str, Any]:
    """The running checks of linear layers."""
    qkv = ("q_proj", "k_proj", "v_proj")
    parts = dict(zip(qkv, ("gptq-3-bit", "int8-weight-only", "gptq-asymmetric-act-order"), strict=True))
    fused = write({f"{ATTENTION}.{part}": kind for part, kind in parts.items()})
    check = decoded_checks.linear
    alike = write({f"{ATTENTION}.{part}": "gptq-3-bit" for part in qkv})
    return {
        "fused": run(check, fused, ATTENTION, qkv),
        "one matrix": run(check, alike, ATTENTION, qkv),
        "one matrix over ranks": run(check, alike, ATTENTION, qkv, 2, 1),
        "fused over ranks": run(check, fused, ATTENTION, qkv, 4, 1),
        # 64 of 256 columns: half a block, and less than Marlin's tile.
        "cut inside of a block": run(check, write({f"{ATTENTION}.o_proj": "fp8-wide"}), ATTENTION, ("o_proj",), 4, 1),
        "smaller than a tile": run(
            check, write({f"{ATTENTION}.o_proj": "gptq-act-order"}), ATTENTION, ("o_proj",), 4, 3
        ),
    }


LINEARS = ("fused", "fused over ranks", "one matrix", "one matrix over ranks", "cut inside of a block")


@pytest.mark.parametrize("name", [*LINEARS, "smaller than a tile"])
def test_a_linear_layer_that_no_kernel_of_sglang_runs_computes_what_it_must(linears: Any, name: str) -> None:
    found = linears[name].result()
    assert found["error"] <= 1e-10
    assert set(found["kinds"]) == {"DecodedRun"}
    assert found["held"] == found["planned"]


def test_parts_that_are_stored_alike_take_one_launch(linears: Any) -> None:
    assert len(linears["fused"].result()["kinds"]) == 3
    assert len(linears["one matrix"].result()["kinds"]) == len(linears["one matrix over ranks"].result()["kinds"]) == 1


@pytest.mark.parametrize(("outputs", "columns", "rows"), [(128, 256, 1), (40, 200, 16), (512, 320, 64)])
def test_a_router_in_16_bits_for_few_tokens_runs_on_our_kernel(run: Any, outputs: int, columns: int, rows: int) -> None:
    found = run(decoded_checks.plain, outputs, columns, rows, torch.float16).result()
    assert found["error"] <= 1e-6  # the output is rounded to 16 bits
    assert not found["is_stock"]


@pytest.mark.parametrize(
    ("outputs", "rows", "dtype", "is_measured"),
    [(520, 1, "float16", True), (128, 65, "float16", True), (128, 1, "float32", True), (128, 1, "float16", False)],
)
def test_all_other_plain_weights_stay_with_sglang_s_method(
    run: Any, outputs: int, rows: int, dtype: str, is_measured: bool
) -> None:
    found = run(decoded_checks.plain, outputs, 256, rows, getattr(torch, dtype), is_measured).result()
    assert found["is_stock"] and found["error"] <= 1e-6


def kinds(mapping: Mapping[str, str], write: Write) -> dict[str, list[int]]:
    plan = make_plan(write(experts(mapping)))
    local = [tuple(plan.modules[name] for name in expert_modules(PREFIX, n, plan.modules)) for n in range(EXPERTS)]
    with loading(plan.rank()):
        return {kind.__name__: members for kind, members in share_out(local)}  # type: ignore[arg-type,attr-defined]


@pytest.mark.parametrize(
    ("wish", "one", "two"),
    [
        ("needed", {"ExpertGroup": [0, 1, 2, 3]}, {"ExpertGroup": [2, 3], "DecodedExperts": [0]}),
        ("mixed", {"ExpertGroup": [0, 1, 2, 3]}, {"DecodedExperts": [0, 1, 2, 3]}),
        ("faster", {"ExpertGroup": [0, 1, 2, 3]}, {"DecodedExperts": [0, 1, 2, 3]}),
        ("all", {"DecodedExperts": [0, 1, 2, 3]}, {"DecodedExperts": [0, 1, 2, 3]}),
    ],
)
def test_the_operator_chooses_what_runs_on_the_triton_kernel(
    wish: str, one: Any, two: Any, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(decoded.TRITON, wish)
    assert kinds({"*.*": "gptq"}, write) == one
    assert kinds({"0.up_proj": "int8", "1.*": "gptq"}, write) == two


@pytest.mark.parametrize(
    ("kind", "capability", "wish", "is_ours"),
    [
        ("gptq-channel", (9, 0), "", True),
        ("gptq-channel", (9, 0), "mixed", False),
        ("gptq-channel", (8, 0), "", False),
        ("gptq", (9, 0), "", False),  # two groups a step
        ("awq", (9, 0), "", False),
        ("fp8-block", (9, 0), "", False),
        ("fp8-block", (8, 0), "all", True),
        ("bf16", (9, 0), "all", False),
    ],
)
def test_sglang_s_kernels_give_way_where_ours_was_measured_to_be_faster(
    kind: str, capability: tuple[int, int], wish: str, is_ours: bool, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(decoded.TRITON, wish)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
    module = make_plan(write({f"{ATTENTION}.q_proj": kind})).modules[f"{ATTENTION}.q_proj"]
    assert bool(decoded.why_wished([module.format])) == is_ours


def test_an_amd_gpu_of_generation_9_is_not_taken_for_a_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 4))
    monkeypatch.setattr("torch.version.hip", "6.4")
    assert not decoded.is_measured_gpu()


def test_a_wish_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(decoded.TRITON, "yes")
    with pytest.raises(EngineError, match="one of faster, mixed, needed, all"):
        decoded.wishes()


def test_experts_in_groups_that_no_kernel_takes_are_refused_by_name(write: Write) -> None:
    with pytest.raises(UnsupportedError) as caught:
        kinds({"2.*": "packed-24"}, write)
    assert f"{PREFIX}.2" in str(caught.value) and "not 24" in str(caught.value)
    assert "marlin: Marlin takes groups of 32, 64, 128" in str(caught.value)
