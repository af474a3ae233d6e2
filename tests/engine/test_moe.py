"""MoE layers on the CPU: what their kernels do not compute is refused while the layer is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sglang.srt.layers.moe.moe_runner import MoeRunnerConfig

from sglang_mixed.engine.layers.moe import CPUMoEMethod
from sglang_mixed.errors import UnsupportedError
from sglang_mixed.plan import make_plan

from .families import EXPERT_WIDTH, EXPERTS, HIDDEN
from .family_models import write_family

OWNER = "model.layers.1.mlp.experts"


def method(folder: Path, family: str, experts: int = EXPERTS) -> CPUMoEMethod:
    write_family(folder / "bf16", family)
    (folder / "map.yaml").write_text("mixed_precision: {bf16_path: bf16, weight_mapping: {}}\n")
    modules = make_plan(folder / "map.yaml").modules
    names = ("gate_proj", "up_proj", "down_proj")
    return CPUMoEMethod(
        OWNER, [tuple(modules[f"{OWNER}.{expert}.{name}"] for name in names) for expert in range(experts)]
    )


@pytest.mark.parametrize(
    ("family", "experts", "with_bias"),
    [("gpt_oss", EXPERTS, False), ("qwen3_moe", EXPERTS, True), ("qwen3_moe", EXPERTS - 1, False)],
)
def test_experts_that_are_not_what_the_model_asks_for(
    family: str, experts: int, with_bias: bool, tmp_path: Path
) -> None:
    layer = torch.nn.Module()
    with pytest.raises(UnsupportedError, match="the engine asks for 8 experts") as caught:
        method(tmp_path, family, experts).create_weights(
            layer, EXPERTS, HIDDEN, EXPERT_WIDTH, torch.bfloat16, with_bias=with_bias
        )
    assert caught.value.tensor == OWNER


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"apply_router_weight_on_input": True}, "apply_router_weight_on_input"),
        ({"no_combine": True}, "no_combine"),
        ({"gemm1_clamp_limit": 7.0}, "gemm1_clamp_limit"),
        ({"activation": "relu2"}, "relu2"),
        ({"activation": "gelu", "gemm1_alpha": 1.7, "gemm1_clamp_limit": 7.0}, "gelu"),
    ],
)
def test_what_the_kernels_do_not_compute_is_named(asked: dict[str, Any], named: str, tmp_path: Path) -> None:
    config = MoeRunnerConfig(**{"activation": "silu", **asked})
    with pytest.raises(UnsupportedError, match=f"experts need {named}"):
        method(tmp_path, "gpt_oss").create_moe_runner(torch.nn.Module(), config)
