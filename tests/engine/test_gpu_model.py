"""A mixed model as SGLang's loader builds and our loader fills it on a GPU; only the kernels are stand-ins."""

from __future__ import annotations

import json
from typing import Any

import pytest

from . import gpu_model
from .launch import TINY, zygote

MAPPING = {
    "model.layers.0.mlp.experts.{0..3}.*": "fp8_block",
    "model.layers.0.mlp.experts.{4..6}.*": "gptq_int4",
    "model.layers.0.mlp.experts.7.*": "int8",
    "model.layers.1.mlp.experts.*.*": "gptq_int4",
    "model.layers.0.self_attn.{q,k,v}_proj": "fp8_channel",
    "model.layers.1.self_attn.q_proj": "gptq_int4",
    "model.layers.1.self_attn.k_proj": "int8",
}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The proof's report, and what `gpu_model.main` adds."""
    folder = tmp_path_factory.mktemp("model")
    sources = dict.fromkeys(("bf16", *MAPPING.values()))
    lines = ["mixed_precision:", *(f"  {name}_path: {TINY / name.replace('_', '-')}" for name in sources)]
    lines += ["  default: bf16", "  weight_mapping:", *(f'    "{name}": {source}' for name, source in MAPPING.items())]
    (folder / "map.yaml").write_text("\n".join(lines))
    job = zygote().start(folder / "log", gpu_model.CODE, str(folder / "map.yaml"), str(folder / "answer.json"))
    try:
        assert job.wait(240) == 0, (folder / "log").read_text()[-4000:]
    finally:
        job.kill()
    found: dict[str, Any] = json.loads((folder / "answer.json").read_text())
    return found


def test_every_weight_of_a_gpu_s_model_is_verified_before_kernels_take_over(report: dict[str, Any]) -> None:
    assert report["verification"]["state"] == "verified"
    assert report["verification"]["verified"] == report["verification"]["modules"] == len(report["modules"]) == 69


def test_a_gpu_s_model_holds_the_planned_bytes(report: dict[str, Any]) -> None:
    assert report["weight_bytes"] == report["planned_bytes"]
    # Scales that SGLang's kernels want in float32 and the files hold in BF16: FP8 blocks and INT8 rows of experts, rows
    # of q, k, v; and what SGLang's Marlin method drops on a GPU: q's g_idx and zero points.
    scales = 4 * (4 * 2 + 2 * 2) + (512 + 256) + (256 + 128 + 128) + 128
    assert report["padding_bytes"] == 2 * scales + 4 * (256 + 2 * 256 // 8)


def test_experts_of_several_formats_compute_through_sglang_s_layer_with_stand_in_kernels(
    report: dict[str, Any],
) -> None:
    assert report["error"] < 1e-5
    groups = {name.split(".")[5] for name in report["kernel_tensors"] if name.startswith("model.layers.0.mlp.experts.")}
    assert groups == {"group_0", "group_1", "group_2"}
    assert "model.layers.1.mlp.experts.group_0.w13_qweight" in report["kernel_tensors"]
