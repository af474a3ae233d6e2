"""The public surface, pinned."""

from __future__ import annotations

import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import sglang_mixed

ROOT = Path(__file__).parents[1]
#: Two names for one thing.
ALIASES = {
    "MixedPrecisionConfig": "MixedPrecisionMap",
    "SGLangGPTQDequantizer": "GPTQDequantizer",
    "TrueMixedPrecisionLoader": "SGLangMixedPrecisionLoader",
}


def test_the_names() -> None:
    assert sorted(sglang_mixed.__all__) == [
        "Checkpoint",
        "DequantizationCache",
        "EnhancedModelLoader",
        "ExpertActivationTracker",
        "GPTQDequantizer",
        "MixedPrecisionConfig",
        "MixedPrecisionError",
        "MixedPrecisionLinear",
        "MixedPrecisionMap",
        "Plan",
        "SGLangGPTQDequantizer",
        "SGLangMixedPrecisionLoader",
        "TrueMixedPrecisionLoader",
        "comprehensive_device_fix",
        "create_proper_attention_mask",
        "dequantize_gptq_weight",
        "export_expert_activation_stats",
        "fix_moe_device_issues",
        "get_expert_activation_stats",
        "get_global_expert_tracker",
        "get_global_true_mixed_precision_loader",
        "get_mixed_precision_memory_stats",
        "is_gptq_weight",
        "load_map",
        "load_model_with_enhanced_features",
        "load_plan",
        "make_plan",
        "open_checkpoint",
        "reset_expert_activation_stats",
        "validate_model_device_consistency",
    ]
    for name in sglang_mixed.__all__:
        assert getattr(sglang_mixed, name).__name__ == ALIASES.get(name, name)
    with pytest.raises(AttributeError, match="nothing"):
        sglang_mixed.nothing  # noqa: B018


def test_the_version_is_written_in_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert sglang_mixed.__version__ == project["version"]
    assert f"\n## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_name_and_its_methods_have_a_docstring() -> None:
    for name in sglang_mixed.__all__:
        public = getattr(sglang_mixed, name)
        assert inspect.getdoc(public), name
        if inspect.isclass(public):
            own = {key: one for key, one in vars(public).items() if not key.startswith("_") and callable(one)}
            assert all(inspect.getdoc(one) for one in own.values()), name


def test_importing_it_costs_nothing() -> None:
    heavy = ("torch", "yaml", "pydantic", "sglang")
    script = f"import sys, sglang_mixed; sys.exit(any(name in sys.modules for name in {heavy}))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
