"""The API guide: SGLang's own Python API with a map, and the module paths of the fork."""

from __future__ import annotations

from pathlib import Path

from sglang_mixed.compatibility import MODULES

from .jobs import run_python

LOADING = """
from sglang.srt.configs.device_config import DeviceConfig
from sglang.srt.configs.load_config import LoadConfig, LoadFormat
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.model_loader.loader import DefaultModelLoader
import sglang_mixed

model_config = ModelConfig(model_path="MODEL", mixed_precision_config="MAP", dtype="auto", trust_remote_code=True)
device_config = DeviceConfig(device="cpu")
load_config = LoadConfig(load_format=LoadFormat.AUTO)
loader = DefaultModelLoader(load_config)
model = loader.load_model(model_config=model_config, device_config=device_config)
"""
ANSWERING = """
import time
from sglang.srt.model_loader.true_mixed_precision_loader import (
    get_global_true_mixed_precision_loader,
    get_mixed_precision_memory_stats,
)

assert type(model).__name__ == "Qwen3MoeForCausalLM"
assert get_global_true_mixed_precision_loader() is not None
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


def test_sglangs_loader_detects_the_map_and_loads_the_mix(tmp_path: Path) -> None:
    assert "answered" in run_python(tmp_path / "log", LOADING + ANSWERING)


def test_errors_come_before_anything_loads_and_the_modules_of_the_fork_resolve(tmp_path: Path) -> None:
    printed = run_python(
        tmp_path / "log", REFUSED + RESOLVING + "from fix_device_issues import fix_moe_device_issues\n"
    )
    assert "mixed precision config file does not exist: config.yaml" in printed
    assert "quantization='fp8' beside a map" in printed
