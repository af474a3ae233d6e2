"""Attention masks of padded batches."""

from __future__ import annotations

from typing import Any

import torch


def create_proper_attention_mask(
    input_ids: torch.Tensor, tokenizer: Any, device: torch.device | str | None = None
) -> torch.Tensor:
    """int64 of input_ids' shape, [tokens] or [batch, tokens]: 0 where a row begins or ends with padding, else 1.

    Padding is the tokenizer's `pad_token_id`, or `eos_token_id` without one. The same token inside the text counts as
    text, so that an end-of-sequence token used as padding stays visible there. A row of nothing else keeps its last.
    """
    padding = getattr(tokenizer, "pad_token_id", None)
    if padding is None:
        padding = getattr(tokenizer, "eos_token_id", None)
    device = input_ids.device if device is None else torch.device(device)
    if padding is None or not input_ids.numel():
        return torch.ones(input_ids.shape, dtype=torch.int64, device=device)
    is_text = (input_ids != padding).to(torch.int64)
    begun = is_text.cumsum(-1) > 0
    unfinished = is_text.flip(-1).cumsum(-1).flip(-1) > 0
    mask = (begun & unfinished).to(torch.int64)
    mask[..., -1] |= (mask.sum(-1) == 0).to(torch.int64)
    found: torch.Tensor = mask.to(device)
    return found
