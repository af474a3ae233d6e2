"""Logits in float32 on the CPU platform, from a head that stays in 16 bits.

A BF16 logit of 12 is known to 1/16 only: log-probabilities would carry that rounding, whatever the weights' format.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...kernels.panels import linear_by_panels


def compute_lm_head(
    original: Callable[..., Any], processor: Any, hidden_states: torch.Tensor, lm_head: Any, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """Hook around `LogitsProcessor._compute_lm_head`: hidden states [rows, hidden] -> float32 [rows, vocabulary]."""
    weight = getattr(lm_head, "weight", None)
    if weight is None or weight.dtype not in (torch.bfloat16, torch.float16) or hasattr(lm_head, "apply_lora"):
        logits: torch.Tensor = original(processor, hidden_states, lm_head, *args, **kwargs)
        return logits

    def decode(start: int, stop: int, target: torch.Tensor) -> None:
        target.copy_(weight[start:stop])

    return linear_by_panels(hidden_states.float(), weight.shape, decode)
