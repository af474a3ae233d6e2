"""config.json that its tensors deny, that asks for code to be run, or that is no config."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from sglang_mixed.errors import (
    CheckpointError,
    CoverageError,
    FormatError,
    InconsistentFormatError,
    MissingFileError,
)

from .base import EXPERT, Attack, edit_json, edit_quantization

CONFIG = "config.json"


def _config(source: str, **changes: Any) -> Any:
    return lambda folder: edit_json(folder / source / CONFIG, **changes)


def _quantization(source: str, **changes: Any) -> Any:
    return lambda folder: edit_quantization(folder / source / CONFIG, **changes)


def _all(**changes: Any) -> Any:
    def build(folder: Path) -> None:
        for source in ("bf16", "fp8", "gptq"):
            edit_json(folder / source / CONFIG, **changes)

    return build


def _key_twice(folder: Path) -> None:
    file = folder / "fp8" / CONFIG
    text = json.dumps(json.loads(file.read_text())["quantization_config"] | {"weight_block_size": [16, 16]})
    file.write_text(file.read_text()[:-1] + f', "quantization_config": {text}}}')


def _remote_code(folder: Path) -> None:
    (folder / "bf16" / "modeling_evil.py").write_text(f"open({str(folder / 'opened')!r}, 'w')\n")
    edit_json(folder / "bf16" / CONFIG, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})


ATTACKS = [
    Attack("no config.json", lambda folder: (folder / "fp8" / CONFIG).unlink(), MissingFileError, "Hugging Face", CONFIG),
    Attack("a config.json cut short", lambda folder: os.truncate(folder / "fp8" / CONFIG, 100), CheckpointError, "JSON", CONFIG),
    Attack("a config.json that is a list", lambda folder: (folder / "fp8" / CONFIG).write_text("[]"), CheckpointError, "JSON", CONFIG),
    Attack("a config.json of 20 MB", lambda folder: os.truncate(folder / "fp8" / CONFIG, 20 << 20), CheckpointError, "at most", CONFIG),
    Attack("a config.json nested 100,000 deep", lambda folder: (folder / "fp8" / CONFIG).write_text('{"a":' * 100_000), CheckpointError, "JSON", CONFIG),
    Attack("a quantization_config given twice", _key_twice, CheckpointError, "stands once", CONFIG),
    Attack("bits that the tensors deny", _quantization("gptq", bits=8), InconsistentFormatError, "bits", tensor=f"{EXPERT}.qweight"),
    Attack("bits of 2^62", _quantization("gptq", bits=1 << 62), InconsistentFormatError, "bits", tensor=f"{EXPERT}.qweight"),
    Attack("bits in words", _quantization("gptq", bits="four"), FormatError, "integers", CONFIG),
    Attack("a group size that the tensors deny", _quantization("gptq", group_size=64), InconsistentFormatError, "group_size", tensor=f"{EXPERT}.qweight"),
    Attack("sym in words", _quantization("gptq", sym="false"), FormatError, "integers", CONFIG),
    Attack("desc_act without a g_idx that says so", _quantization("gptq", quant_method="awq"), InconsistentFormatError, "GPTQ needs", tensor=f"{EXPERT}.qweight"),
    Attack("a quantizer nobody knows", _quantization("gptq", quant_method="evil"), InconsistentFormatError, "GPTQ needs", tensor=f"{EXPERT}.qweight"),
    Attack("a block size that the scales deny", _quantization("fp8", weight_block_size=[16, 16]), InconsistentFormatError, "per block 16x16", "model.safetensors"),
    Attack("blocks of no rows", _quantization("fp8", weight_block_size=[0, 32]), InconsistentFormatError, "per channel", "model.safetensors"),
    Attack("no quantization_config beside GPTQ's tensors", _config("gptq", quantization_config=...), InconsistentFormatError, "bits", tensor=f"{EXPERT}.qweight"),
    Attack("a quantization_config that is a list", _config("fp8", quantization_config=[1]), CheckpointError, "an object", CONFIG),
    Attack("an exception that takes 2^30 steps to match", _quantization("gptq", dynamic={"-:(a+)+$": {}}), FormatError, "no repetition within", CONFIG),
    Attack("exceptions that compete for the same characters", _quantization("gptq", dynamic={".*" * 9 + "x": {"bits": 8}}), FormatError, "at most", CONFIG),
    Attack("an exception that is no regular expression", _quantization("gptq", dynamic={"-:(": {}}), FormatError, "regular expressions", CONFIG),
    Attack("weights stored rotated", _quantization("gptq", transform_config={"config_groups": {"a": {}}}), FormatError, "nothing else", CONFIG),
    Attack("experts counted in words", _all(num_experts="two"), CheckpointError, "whole number", CONFIG),
    Attack("a model_type that is a number", _all(model_type=3), CheckpointError, "a name", CONFIG),
    Attack("architectures that are no list", _all(architectures={"a": 1}), CheckpointError, "list of names", CONFIG),
    Attack("2^70 layers", _all(num_hidden_layers=1 << 70), CheckpointError, "whole number", CONFIG),
    Attack("a layer more than there is", _all(num_hidden_layers=2), CoverageError, "counts", "bf16", "model.layers.1"),
    Attack("an expert more than there is", _all(num_experts=3), CoverageError, "counts", "bf16", "model.layers.0.mlp.experts.2"),
    Attack("code of its own that would be run", _remote_code, None, ""),
]  # fmt: skip
