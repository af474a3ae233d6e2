"""The public surface, pinned."""

from __future__ import annotations

import subprocess
import sys

import pytest

import sglang_mixed


def test_the_names() -> None:
    assert sorted(sglang_mixed.__all__) == [
        "Checkpoint",
        "ExpertActivationTracker",
        "MixedPrecisionError",
        "MixedPrecisionMap",
        "Plan",
        "export_expert_activation_stats",
        "get_expert_activation_stats",
        "get_global_expert_tracker",
        "get_mixed_precision_memory_stats",
        "load_map",
        "make_plan",
        "open_checkpoint",
        "reset_expert_activation_stats",
    ]
    for name in sglang_mixed.__all__:
        assert getattr(sglang_mixed, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing"):
        sglang_mixed.nothing  # noqa: B018


def test_importing_it_costs_nothing() -> None:
    script = "import sys, sglang_mixed; sys.exit(any(name in sys.modules for name in ('torch', 'yaml', 'pydantic')))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
