"""Transformers models to fill, and their references."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sglang_mixed.plan import Plan

from ..engine.reference import write_reference


def build_on_meta(folder: Path) -> Any:
    """A model without weights, as the config of a checkpoint describes it."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


def dequantized(plan: Plan, folder: Path) -> Any:
    """The plan's model in BF16, as transformers itself loads it."""
    return AutoModelForCausalLM.from_pretrained(write_reference(plan, folder), dtype=torch.bfloat16).eval()


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())
