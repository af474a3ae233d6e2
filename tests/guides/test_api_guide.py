"""The API guide: SGLang's own Python API with a map, and the module paths of the fork."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest

import sglang_mixed
from sglang_mixed.compatibility import MODULES

from ..engine.launch import TINY
from .jobs import run_python

LOADING = """
from sglang.srt.configs.device_config import DeviceConfig
from sglang.srt.configs.load_config import LoadConfig, LoadFormat
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.model_loader.loader import DefaultModelLoader
import sglang_mixed
from sglang.srt.model_loader.true_mixed_precision_loader import get_global_true_mixed_precision_loader

assert not get_global_true_mixed_precision_loader()
model_config = ModelConfig(model_path="MODEL", mixed_precision_config="MAP", dtype="auto", trust_remote_code=True)
device_config = DeviceConfig(device="cpu")
load_config = LoadConfig(load_format=LoadFormat.AUTO)
loader = DefaultModelLoader(load_config)
model = loader.load_model(model_config=model_config, device_config=device_config)
"""
ANSWERING = """
import time
from sglang.srt.layers.mixed_precision_linear import get_mixed_precision_memory_stats

assert type(model).__name__ == "Qwen3MoeForCausalLM"
assert get_global_true_mixed_precision_loader()
print(f"{get_mixed_precision_memory_stats()['memory_saved_mb']:.2f} MB")
print(f"{get_mixed_precision_memory_stats()['compression_ratio']:.2f}x")
while (stats := get_mixed_precision_memory_stats())["verification"]["state"] == "running":
    time.sleep(0.01)
assert stats["verification"]["state"] == "verified", stats
assert stats["weight_bytes"] == stats["planned_bytes"]
assert stats["memory_saved_mb"] > 3 and stats["compression_ratio"] > 1.7

from sglang.srt.model_loader.sglang_mixed_precision_loader import SGLangMixedPrecisionLoader

again = SGLangMixedPrecisionLoader(load_config).load_model(model_config=model_config, device_config=device_config)
assert {name: p.shape for name, p in again.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
print("answered")
"""
REFUSED = """
import sglang_mixed
from sglang.srt.configs.model_config import ModelConfig

for arguments in ({"mixed_precision_config": "config.yaml"}, {"mixed_precision_config": "MAP", "quantization": "fp8"}):
    try:
        ModelConfig(model_path="MODEL", **arguments)
    except sglang_mixed.MixedPrecisionError as error:
        print(error.what)
assert ModelConfig(model_path="MODEL", mixed_precision_config=None).quantization is None
"""
RESOLVING = "import sglang_mixed\n" + "".join(
    f"import {module}\nassert {module}.MixedPrecisionLinear is sglang_mixed.MixedPrecisionLinear\n"
    for module in sorted(MODULES)
)
STANDALONE = """
import time
import torch
from transformers import AutoConfig, AutoModelForCausalLM
import sglang_mixed
from sglang.srt.enhanced_model_loader import (
    export_expert_activation_stats,
    get_expert_activation_stats,
    load_model_with_enhanced_features,
    reset_expert_activation_stats,
)
from sglang.srt.model_loader.enhanced_mixed_precision_loader import get_global_expert_tracker

config_path = "MAP"
with torch.device("meta"):
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained("MODEL"))
start_time = time.time()
stats = load_model_with_enhanced_features(model, config_path)
load_time = time.time() - start_time
assert load_time >= stats["seconds"] > 0
model(torch.arange(64)[None])

tracker = get_global_expert_tracker()
assert tracker and tracker is stats["loader"].get_expert_tracker()
stats = get_expert_activation_stats()
expert_stats = get_expert_activation_stats(layer_id=0, expert_id=1)
top_experts = get_expert_activation_stats()["top_experts"]
assert expert_stats == stats["expert_stats"]["layer_0_expert_1"]
assert set(get_expert_activation_stats(layer_id=1)) == {n for n in stats["expert_stats"] if n.startswith("layer_1_")}
assert top_experts[0]["activation_count"] >= top_experts[-1]["activation_count"] > 0
export_expert_activation_stats("FOLDER/expert_stats.json")
reset_expert_activation_stats()
assert not get_expert_activation_stats()["expert_stats"]
"""
HELPING = """
from types import SimpleNamespace
from fix_device_issues import (
    comprehensive_device_fix,
    create_proper_attention_mask,
    fix_moe_device_issues,
    validate_model_device_consistency,
)

tokenizer = SimpleNamespace(pad_token_id=None, pad_token=None, eos_token_id=9, eos_token="</s>")
results = comprehensive_device_fix(model, tokenizer, "cpu")
assert results["tokenizer_fixed"] and results["validation"]["is_consistent"] and not results["issues_found"]
assert create_proper_attention_mask(torch.tensor([[9, 5, 6]]), tokenizer, "cpu").tolist() == [[0, 1, 1]]
model = fix_moe_device_issues(model, "cpu")
validation = validate_model_device_consistency(model, "cpu")
assert validation["is_consistent"] and validation["issues"] == []
"""
DEQUANTIZING = """
import torch
from safetensors.torch import load_file
import sglang_mixed
from sglang.srt.model_loader.enhanced_mixed_precision_loader import (
    GPTQDequantizer,
    dequantize_gptq_weight,
    is_gptq_weight,
)

qweight = torch.randint(0, 16, (256, 768), dtype=torch.int32)
qzeros = torch.randint(0, 16, (16, 96), dtype=torch.int32)
scales = torch.randn(16, 768, dtype=torch.float16)
weight = GPTQDequantizer.dequantize_gptq_weight(qweight, qzeros, scales)
assert weight.shape == (768, 2048)

weights, module = load_file("INT4/model.safetensors"), "model.layers.0.mlp.experts.0.up_proj"
assert is_gptq_weight(weights, f"{module}.weight") and not is_gptq_weight(weights, "model.norm.weight")
tensors = [weights.get(f"{module}.{name}") for name in ("qweight", "qzeros", "scales", "g_idx")]
weight = dequantize_gptq_weight(*tensors)
assert weight.shape == tuple(sglang_mixed.open_checkpoint("INT4").format(module).shape)
print("dequantized")
"""
ELSEWHERE = """
import sglang_mixed
from sglang.srt.layers.mixed_precision_linear import get_mixed_precision_memory_stats

try:
    get_mixed_precision_memory_stats()
except sglang_mixed.MixedPrecisionError as error:
    print(error)
"""
#: The guide's reference: class -> method -> its parameters. Ours may take more after them.
REFERENCE = {
    "EnhancedModelLoader": {
        "__init__": ["config_path", "enable_expert_tracking"],
        "load_model": ["model", "enable_moe_tracking"],
        "get_expert_tracker": [],
        "get_expert_stats": ["layer_id", "expert_id"],
        "get_top_experts": ["top_k"],
        "get_layer_stats": [],
        "reset_expert_stats": [],
        "export_expert_stats": ["file_path"],
    },
    "GPTQDequantizer": {
        "dequantize_gptq_weight": ["qweight", "qzeros", "scales", "g_idx", "bits", "group_size"],
    },
    "ExpertActivationTracker": {
        "record_expert_activation": ["layer_id", "expert_id", "tokens_processed", "request_id"],
        "record_request": ["request_id", "input_length", "output_length"],
        "get_expert_stats": ["layer_id", "expert_id"],
        "get_top_experts": ["top_k"],
        "get_layer_stats": [],
        "reset_stats": [],
        "export_stats": ["file_path"],
    },
}
DEFAULTS = {
    "enable_expert_tracking": True,
    "enable_moe_tracking": True,
    "top_k": 10,
    "bits": 4,
    "group_size": 128,
    "tokens_processed": 1,
}


def test_sglangs_loader_detects_the_map_and_loads_the_mix(tmp_path: Path) -> None:
    assert "answered" in run_python(tmp_path / "log", LOADING + ANSWERING)


def test_errors_come_before_anything_loads_and_the_modules_of_the_fork_resolve(tmp_path: Path) -> None:
    printed = run_python(
        tmp_path / "log", REFUSED + RESOLVING + "from fix_device_issues import fix_moe_device_issues\n"
    )
    assert "mixed precision config file does not exist: config.yaml" in printed
    assert "quantization='fp8' beside a map" in printed


def test_a_model_without_an_engine_is_loaded_counted_and_kept_on_one_device(tmp_path: Path) -> None:
    run_python(tmp_path / "log", STANDALONE + HELPING, FOLDER=tmp_path)
    exported = json.loads((tmp_path / "expert_stats.json").read_text())
    assert set(exported) >= {"expert_stats", "layer_stats", "top_experts"}
    one = exported["expert_stats"]["layer_0_expert_1"]
    brief = {"activation_count", "total_tokens_processed"}
    assert set(one) == brief | {"layer_id", "expert_id", "last_activation_time"}
    layer = exported["layer_stats"]["0"]
    assert set(layer) == {"total_experts", "total_activations", "total_tokens", "experts"}
    assert layer["experts"]["1"] == {name: one[name] for name in brief}
    assert set(exported["top_experts"][0]) == brief | {"layer_id", "expert_id"}


def test_gptq_tensors_are_found_and_dequantized(tmp_path: Path) -> None:
    assert "dequantized" in run_python(tmp_path / "log", DEQUANTIZING, INT4=TINY / "gptq-int4")


def test_memory_is_asked_for_where_the_model_is(tmp_path: Path) -> None:
    printed = run_python(tmp_path / "log", ELSEWHERE)
    assert "no mixed-precision model runs in this process" in printed and "sglang-mixed proof URL" in printed


@pytest.mark.parametrize(("name", "methods"), REFERENCE.items())
def test_the_reference_is_the_signatures(name: str, methods: dict[str, list[str]]) -> None:
    for method, parameters in methods.items():
        found = {
            key: one
            for key, one in inspect.signature(getattr(getattr(sglang_mixed, name), method)).parameters.items()
            if key != "self"
        }
        assert list(found)[: len(parameters)] == parameters, method
        assert all(one.default is not one.empty for key, one in found.items() if key not in parameters)
        assert all(found[key].default == DEFAULTS[key] for key in parameters if key in DEFAULTS), method
