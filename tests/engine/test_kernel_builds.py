"""SGLang's Marlin kernels are compiled while weights load; only real compilations are left to a GPU's host."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from sglang.srt.layers.moe.moe_runner.base import MoeRunnerConfig

from sglang_mixed.engine.layers.decoded import TRITON
from sglang_mixed.engine.layers.grouped_moe import MixedMoE
from sglang_mixed.engine.layers.linear_methods import compiled
from sglang_mixed.engine.loading import kernel_builds
from sglang_mixed.engine.loading.kernel_builds import (
    TARGET,
    Kernel,
    KernelBuilds,
    cache_folder,
    experts,
    linear,
    repacking,
)
from sglang_mixed.engine.names import expert_modules
from sglang_mixed.plan import Rank, make_plan

from ..models import write_map
from .layers import HIDDEN, PREFIX, fill, write_experts

BF16 = torch.bfloat16
KERNELS = [linear(BF16), experts(BF16, True), repacking(False)]


@pytest.fixture(autouse=True)
def in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that mix run on SGLang's kernels, a group a format: by default ours runs them at once."""
    monkeypatch.setenv(TRITON, "needed")


@pytest.mark.parametrize(
    ("formats", "needed"),
    [
        (["bf16", "fp8-block", "int8", "bf16"], set()),
        (["gptq"] * 4, {repacking(False), experts(BF16, False)}),
        (["gptq", "bf16", "gptq", "int8"], {repacking(False), experts(BF16, True)}),
        (["awq"] * 4, {repacking(True), experts(BF16, False)}),
        (["gptq", "awq", "gptq", "awq"], {repacking(False), repacking(True), experts(BF16, True)}),
    ],
)
def test_a_plan_s_experts_name_the_kernels_they_need(tmp_path: Path, formats: list[str], needed: set[Kernel]) -> None:
    sources = {
        f"source_{number}": write_experts(tmp_path / kind, kind, intermediate=192)
        for number, kind in enumerate(dict.fromkeys(("bf16", *formats)))
    }
    names = dict(zip(dict.fromkeys(("bf16", *formats)), sources, strict=True))
    mapping = {f"{PREFIX}.{expert}.*": names[kind] for expert, kind in enumerate(formats)}
    plan = make_plan(write_map(tmp_path, mapping, default="source_0", **sources)).rank(Rank(1, 1, 0))
    threes = [expert_modules(PREFIX, number, plan.plan.modules) for number in range(4)]
    modules = [tuple(plan.plan.modules[name] for name in three) for three in threes]

    def build() -> tuple[MixedMoE, torch.nn.Module]:
        method, layer = MixedMoE(PREFIX, modules), torch.nn.Module()  # type: ignore[arg-type]
        method.create_weights(layer, 4, HIDDEN, 192, BF16)
        method.create_moe_runner(layer, MoeRunnerConfig(num_experts=4, num_local_experts=4, activation="silu"))
        return method, layer

    method, _ = fill(plan, build)
    assert set().union(*(group.compiled for group in method.groups)) == needed


@pytest.mark.parametrize(
    ("kind", "needed"),
    [
        ("gptq", {repacking(False), linear(BF16)}),
        ("awq", {repacking(True), linear(BF16)}),
        ("fp8-block", set()),
        ("int8", set()),
        ("bf16", set()),
    ],
)
def test_a_plan_s_linears_name_the_kernels_they_need(tmp_path: Path, kind: str, needed: set[Kernel]) -> None:
    source = write_experts(tmp_path / kind, kind, intermediate=192)
    plan = make_plan(write_map(tmp_path, {}, default="only", only=source))
    assert compiled(plan.modules[f"{PREFIX}.0.up_proj"].format, BF16) == needed


def test_all_are_compiled_at_once_by_a_stand_in_for_the_compiler() -> None:
    together = threading.Barrier(len(KERNELS), timeout=30)
    KernelBuilds(KERNELS, build=lambda kernel: together.wait() and None).wait()
    assert not together.broken


def test_no_more_at_once_than_max_jobs_allows_a_stand_in_for_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_JOBS", "1")
    one, met = threading.Lock(), []

    def build(kernel: Kernel) -> None:
        met.append(one.acquire(blocking=False))
        threading.Event().wait(0.02)
        one.release()

    KernelBuilds(KERNELS, build=build).wait()
    assert met == [True] * len(KERNELS)


def test_progress_is_said_until_a_stand_in_for_the_compiler_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_builds, "PATIENCE", 0.01)
    monkeypatch.setattr(kernel_builds, "INTERVAL", 0.01)
    said: list[str] = []
    first, rest = threading.Event(), threading.Event()

    def hear(level: int, line: str, *values: object) -> None:
        said.append(line % values)
        first.set()
        if "1 of 3" in said[-1]:
            rest.set()

    monkeypatch.setattr(kernel_builds.logger, "log", hear)
    # One is ready after the first line, the others after a line that says so.
    KernelBuilds(KERNELS, build=lambda kernel: (first if kernel == repacking(False) else rest).wait(30) and None).wait()
    assert "0 of 3 ready" in said[0] and "left: MoE with expert map, bfloat16; linear, bfloat16; repacking" in said[0]
    assert any("1 of 3 ready" in line and "repacking" not in line for line in said)
    assert said[-1].startswith("mixed precision: compiled Marlin kernels: 3 of 3 ready")
    assert all(str(cache_folder()) in line for line in said)


def test_what_is_cached_is_not_spoken_of(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger=kernel_builds.__name__)
    KernelBuilds(KERNELS, build=lambda kernel: None).wait()
    assert not caplog.records


def test_a_kernel_that_does_not_compile_is_left_to_sglang(caplog: pytest.LogCaptureFixture) -> None:
    def build(kernel: Kernel) -> None:
        if kernel == linear(BF16):
            raise RuntimeError("no nvcc\nand much more")

    KernelBuilds(KERNELS, build=build).wait()
    (record,) = caplog.records
    assert "linear, bfloat16 was not compiled ahead of its first call" in record.message
    assert record.message.endswith("RuntimeError: no nvcc")


@pytest.mark.parametrize("before", [None, "8.0 9.0"])
def test_the_user_s_environment_is_as_before(monkeypatch: pytest.MonkeyPatch, before: str | None) -> None:
    monkeypatch.delenv(TARGET, raising=False)
    if before:
        monkeypatch.setenv(TARGET, before)
    monkeypatch.setattr(kernel_builds, "_target", lambda: "9.0a")
    seen: list[str] = []
    KernelBuilds(KERNELS, build=lambda kernel: seen.append(os.environ[TARGET])).wait()
    assert seen == ["9.0a"] * 3 and os.environ.get(TARGET) == before


@pytest.mark.parametrize(
    ("package", "signature", "given"),
    [
        (
            "sglang.kernels.ops.moe",
            lambda dtype, is_ep, has_bias: calls.append((dtype, is_ep, has_bias)),
            (BF16, True, False),
        ),
        ("sglang.jit_kernel", lambda dtype: calls.append((dtype,)), (BF16,)),
    ],
)
def test_sglang_s_builder_is_called_as_sglang_calls_it(
    monkeypatch: pytest.MonkeyPatch, package: str, signature: Callable[..., None], given: tuple[object, ...]
) -> None:
    module = ModuleType("moe_wna16_marlin")
    module._jit_moe_wna16_marlin_module = signature  # type: ignore[attr-defined]
    monkeypatch.setattr(kernel_builds, "PACKAGES", (package,))
    monkeypatch.setitem(sys.modules, package, ModuleType(package))
    monkeypatch.setitem(sys.modules, f"{package}.moe_wna16_marlin", module)
    calls.clear()
    experts(BF16, True).build()
    assert calls == [given]


calls: list[tuple[object, ...]] = []


@pytest.mark.parametrize("kernel", [*KERNELS, repacking(True)], ids=str)
def test_this_sglang_has_the_kernel(kernel: Kernel) -> None:
    assert callable(kernel_builds._builder(kernel.module))
