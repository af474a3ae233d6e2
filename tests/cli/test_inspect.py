"""`sglang-mixed inspect`: what checkpoints are, and what of them contradicts itself or others of their kind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from sglang_mixed.cli.inspect import describe
from sglang_mixed.cli.main import app
from sglang_mixed.plan import make_plan

from ..models import Tensors, write

TINY = Path(__file__).parents[2] / "examples" / "tiny"
RUNNER = CliRunner()
FORMATS = ("bf16", "fp8-block", "fp8-channel", "gptq-int4", "int8")


@pytest.mark.parametrize("name", FORMATS)
def test_figures_are_those_of_the_files_and_of_a_plan(name: str) -> None:
    report, plan = describe(str(TINY / name)), make_plan(TINY / name)
    with safe_open(TINY / name / "model.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert report["tensors"] == len(tensors)
    assert report["file_bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert report["resident_bytes"] == plan.weight_bytes()
    assert 2 * report["parameters"] == plan.bf16_bytes == 2 * describe(str(TINY / "bf16"))["parameters"]
    assert report["modules"] == len(plan.modules) == sum(row["count"] for row in report["rows"])
    assert {(row["modules"], row["format"]) for row in report["rows"]} == {
        (row.modules, row.format) for row in plan.rows()
    }


def test_several_checkpoints_stand_side_by_side() -> None:
    result = RUNNER.invoke(app, ["inspect", *(str(TINY / name) for name in FORMATS[:2])])
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["bf16", "fp8-block"] in lines and ["parameters", "4,527,616", "4,527,616"] in lines
    assert ["quantization", "none", "compressed-tensors"] in lines


def test_json_is_a_list_of_what_the_tables_show() -> None:
    result = RUNNER.invoke(app, ["inspect", str(TINY / "int8"), "--json"])
    assert json.loads(result.stdout) == [describe(str(TINY / "int8"))]


def test_a_folder_that_is_none_is_one_message(tmp_path: Path) -> None:
    result = RUNNER.invoke(app, ["inspect", str(tmp_path / "none")])
    assert result.exit_code == 1 and result.stderr.startswith("error: no checkpoint folder")


def without(*names: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in names:
            del tensors[name]

    return change


def with_tensors(**more: torch.Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name.replace("__", "."): tensor for name, tensor in more.items()})


def as_float32(tensors: Tensors) -> None:
    tensors["model.layers.1.mlp.gate.weight"] = tensors["model.layers.1.mlp.gate.weight"].float()


Q = "model__layers__0__self_attn__q_proj"
ODDITIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "a format that is not read": (
        "bf16",
        {
            "change": with_tensors(
                **{f"{Q}__SCB": torch.ones(64), f"{Q}__weight": torch.zeros(64, 64, dtype=torch.int8)}
            )
        },
        r"model.layers.0.self_attn.q_proj: bitsandbytes is recognised but not read",
    ),
    "a config of quantization over 16 bits": (
        "bf16",
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "config.json says gptq, and no module is quantized",
    ),
    "blocks that no config tells of": (
        "fp8",
        {"quantization_config": None},
        "config.json denies it",
    ),
    "a matrix left in 16 bits": (
        "fp8",
        {
            "change": lambda found: (
                found.update({f"{Q.replace('__', '.')}.weight": torch.ones(64, 64).bfloat16()})
                or found.pop(f"{Q.replace('__', '.')}.weight_scale_inv")
            )
        },
        "1 matrices are not quantized: model.layers.0.self_attn.q_proj",
    ),
    "another dtype than the config's": (
        "bf16",
        {"torch_dtype": "bfloat16", "change": as_float32},
        "config.json says bfloat16, and 1 modules are F32: model.layers.1.mlp.gate",
    ),
    "layers that the config does not count": ("bf16", {"num_hidden_layers": 3}, "counts 3 layers, the files hold 2"),
    "experts that the config does not count": (
        "bf16",
        {"change": without("model.layers.1.mlp.experts.3.down_proj.weight")},
        "counts 4 experts, 2 layers hold 7 in all",
    ),
    "another vocabulary": ("bf16", {"vocab_size": 97}, "counts 97 tokens, model.embed_tokens has 96 rows"),
    "a norm that one layer lacks": (
        "bf16",
        {"change": without("model.layers.1.self_attn.k_norm.weight")},
        "model.layers.1.self_attn.k_norm: not there, as in other layers",
    ),
    "layers for several tokens": (
        "bf16",
        {"num_hidden_layers": 1},
        r"modules are never loaded: model.layers.1.input_layernorm",
    ),
    "scales of a cache": (
        "bf16",
        {"change": with_tensors(model__layers__0__self_attn__k_scale=torch.ones(1))},
        "scales of a quantized key-value cache stand beside 1 modules: model.layers.0.self_attn",
    ),
    "a tied head": ("bf16", {"tie_word_embeddings": True, "architectures": ["X"]}, "the head is tied"),
}


@pytest.mark.parametrize("oddity", ODDITIES)
def test_what_is_odd_is_told(oddity: str, tmp_path: Path) -> None:
    kind, options, expected = ODDITIES[oddity]
    report = describe(str(write(tmp_path / "odd", kind, **options)))
    assert [line for line in report["oddities"] if expected in line], report["oddities"]
    assert not [line for line in describe(str(write(tmp_path / "usual", kind)))["oddities"] if expected in line]


def test_what_is_not_loaded_takes_no_memory(tmp_path: Path) -> None:
    report = describe(str(write(tmp_path / "odd", num_hidden_layers=1)))
    assert report["resident_bytes"] == make_plan(tmp_path / "odd").weight_bytes() < report["file_bytes"]
    assert 2 * report["parameters"] == make_plan(tmp_path / "odd").bf16_bytes


def test_files_that_the_index_does_not_name_are_told(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", shards=2)
    (folder / "adapter.safetensors").write_bytes(b"")
    assert "1 .safetensors files are not the checkpoint's: adapter.safetensors" in describe(str(folder))["oddities"]


def test_quantized_weights_that_no_config_tells_of_are_told(tmp_path: Path) -> None:
    config = json.loads((TINY / "int8" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(TINY / "int8" / "model.safetensors", tmp_path)
    assert describe(str(tmp_path))["oddities"] == [
        "config.json has no quantization_config, and modules are INT8 channel"
    ]
