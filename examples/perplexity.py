"""Perplexity of held-out text, from the log-probabilities that SGLang itself gives for a prompt."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

#: Prompts as token ids -> SGLang's answers, as `Engine.generate` and `POST /generate` give them.
Generate = Callable[[list[list[int]]], list[dict[str, Any]]]

REQUEST: dict[str, Any] = {
    "sampling_params": {"max_new_tokens": 1, "temperature": 0},
    "return_logprob": True,
    "logprob_start_len": 0,
}


def windows(model: Path, text: Path, length: int = 256, count: int = 32) -> list[list[int]]:
    """The first `count` windows of `length` tokens of a text."""
    ids: list[int] = AutoTokenizer.from_pretrained(str(model))(text.read_text())["input_ids"]
    return [ids[begin : begin + length] for begin in range(0, length * count, length)]


def perplexity(prompts: list[list[int]], generate: Generate) -> float:
    """exp of the mean negative log-probability of every token but each window's first."""
    answers = generate(prompts)
    logprobs = [
        value for answer in answers for value, *_ in answer["meta_info"]["input_token_logprobs"] if value is not None
    ]
    return math.exp(-sum(logprobs) / len(logprobs))
