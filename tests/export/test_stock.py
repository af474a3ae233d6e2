"""A mix of which one source's config is true is read by other tools, with the bytes that it was made of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sglang_mixed.checkpoint import Checkpoint, open_checkpoint
from sglang_mixed.export import export
from sglang_mixed.formats.mix import KEY, METHOD
from sglang_mixed.plan import make_plan

from ..models import Tensors, write, write_map
from .test_export import SHARD, assert_same_model

#: Of everything that runs as one, some is taken from the quantized source and some is left in 16 bits.
PARTS = {"**.o_proj": "other", "model.layers.0.**.{q,k,v}_proj": "other", "model.layers.1.mlp.**.*_proj": "other"}


def eight_bits(kind: str) -> dict[str, Any]:
    """What llm-compressor writes of weights with a scale a row."""
    weights = {"num_bits": 8, "type": kind, "strategy": "channel", "symmetric": True, "dynamic": False}
    inputs = {"num_bits": 8, "type": kind, "strategy": "token", "symmetric": True, "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "config_groups": {"group_0": group},
    }


def in_eight_bits(kind: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            weight = tensors[name].float()
            scale = weight.abs().amax(1, keepdim=True) / (448 if kind == "float" else 127)
            codes = weight / scale
            tensors[name] = codes.to(torch.float8_e4m3fn) if kind == "float" else codes.round().to(torch.int8)
            tensors[f"{name}_scale"] = scale.to(torch.bfloat16)

    return change


def exported(folder: Path, other: str, experts: int, parts: dict[str, str] | None = None) -> Path:
    """A mix of a 16-bit source and another one, which is read as what it is by us."""
    base = write(folder / "base", experts=experts)
    if other in ("float", "int"):
        config = eight_bits(other)
        path = write(folder / "other", experts=experts, change=in_eight_bits(other), quantization_config=config)
    else:
        path = write(folder / "other", other, experts=experts)
    plan = make_plan(write_map(folder, PARTS if parts is None else parts, base=base, other=path))
    export(plan, folder / "out", SHARD)
    assert_same_model(folder / "out", plan)
    return folder / "out"


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def stored(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """The tensor of a name in transformers, which joins a layer's experts, and gate and up of each."""
    if name in checkpoint.entries:
        return checkpoint.read_tensor(name)
    owner, _, last = name.rpartition(".")
    matrix, _, scale = last.partition("_proj")
    parts = ("gate", "up") if matrix == "gate_up" else (matrix,)
    experts = sum(module.startswith(f"{owner}.") and module.endswith(".up_proj") for module in checkpoint.modules)
    each = (
        torch.cat([checkpoint.read_tensor(f"{owner}.{expert}.{part}_proj.weight{scale}") for part in parts])
        for expert in range(experts)
    )
    return torch.stack([*each])


@pytest.mark.parametrize(
    ("other", "experts"), [("bf16", 0), ("bf16", 4), ("float", 0), ("int", 0), ("fp8", 0), ("fp8", 4)]
)
def test_transformers_holds_the_bytes_of_the_sources(
    tmp_path: Path, other: str, experts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = exported(tmp_path, other, experts)
    if other == "fp8":  # on a CPU transformers makes 16 bits of these weights, unless it believes in a GPU
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        monkeypatch.setattr("transformers.quantizers.quantizer_finegrained_fp8.is_accelerate_available", lambda: True)
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(report.values())
    checkpoint = open_checkpoint(folder)
    for name, tensor in model.state_dict().items():
        expected = stored(checkpoint, name)
        assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape), name
        assert torch.equal(tensor.contiguous().view(torch.uint8), expected.view(torch.uint8)), name


@pytest.mark.parametrize("other", ["bf16", "float", "int", "fp8", "gptq"])
@pytest.mark.parametrize("experts", [0, 4])
def test_what_other_tools_are_told_is_the_same_model(tmp_path: Path, other: str, experts: int) -> None:
    folder = exported(tmp_path, other, experts)
    formats = {name: open_checkpoint(folder).format(name) for name in open_checkpoint(folder).modules}
    config = config_of(folder)
    assert config.pop(KEY)["quant_method"] == METHOD
    (folder / "config.json").write_text(json.dumps(config))
    told = open_checkpoint(folder)
    assert told.quantization.get("quant_method") != METHOD
    assert {name: told.format(name) for name in told.modules} == formats


def test_a_name_that_the_source_leaves_in_16_bits_too_is_not_repeated(tmp_path: Path) -> None:
    folder = exported(tmp_path, "float", 4, {"**.*_proj": "other"})
    assert config_of(folder)["quantization_config"] == eight_bits("float")
    assert "its compressed-tensors config" in (folder / "README.md").read_text()


OTHERS = {
    "two formats": ("gptq", {"**.o_proj": "other", "**.down_proj": "third"}),
    "a part of a matrix that engines make of several": ("fp8", {"**.q_proj": "other"}),
    "some experts of a layer": ("fp8", {"**.experts.{0..1}.**": "other"}),
    "one projection of the experts": ("fp8", {"**.experts.*.down_proj": "other"}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_mix_that_no_other_tool_can_read_says_so(tmp_path: Path, name: str) -> None:
    other, parts = OTHERS[name]
    sources = {"base": write(tmp_path / "base"), "other": write(tmp_path / "other", other)}
    sources |= {"third": write(tmp_path / "third", "fp8")} if "third" in parts.values() else {}
    export(make_plan(write_map(tmp_path, parts, **sources)), tmp_path / "out", SHARD)
    config = config_of(tmp_path / "out")
    assert config["quantization_config"]["quant_method"] == METHOD and KEY not in config
    assert "Tools that know of no mixes" not in (tmp_path / "out" / "README.md").read_text()


def test_an_export_of_an_export_is_read_by_other_tools_too(tmp_path: Path) -> None:
    first = exported(tmp_path, "fp8", 4)
    plan = make_plan(first)
    export(plan, tmp_path / "again", SHARD)
    assert_same_model(tmp_path / "again", plan)
    assert config_of(tmp_path / "again")["quantization_config"] == config_of(first)["quantization_config"]


def test_the_engine_serves_it_as_a_mix_without_a_flag(tmp_path: Path) -> None:
    from sglang_mixed.engine.arguments import translate

    folder = exported(tmp_path, "fp8", 4)
    assert translate({"model_path": str(folder)}, set())["quantization"] == METHOD
