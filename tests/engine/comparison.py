"""How far a mix's answers are from its reference's."""

from __future__ import annotations

import random
from typing import Any

from .launch import TINY

REQUEST: dict[str, Any] = {
    "sampling_params": {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True},
    "return_logprob": True,
    "logprob_start_len": 0,
    "top_logprobs_num": 2,
}
BOUND = 0.02


def held_out_prompts() -> list[list[int]]:
    """20 prompts of held-out text, 16 to 130 tokens."""
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(TINY / "bf16" / "tokenizer.json")).encode((TINY / "heldout.txt").read_text()).ids
    return [ids[200 * index : 200 * index + 16 + 6 * index] for index in range(20)]


def random_prompts(vocabulary: int) -> list[list[int]]:
    """20 prompts of 12 to 31 tokens, for a model that was never trained."""
    choose = random.Random(0)
    return [[choose.randrange(2, vocabulary) for _ in range(12 + index)] for index in range(20)]


def largest_difference(mixed: list[dict[str, Any]], reference: list[dict[str, Any]]) -> float:
    """Largest difference of two engines' log-probabilities of the same prompts' tokens."""
    return max(_differences(mixed, reference))


def mean_difference(mixed: list[dict[str, Any]], reference: list[dict[str, Any]]) -> float:
    """Mean difference of the same."""
    differences = _differences(mixed, reference)
    return sum(differences) / len(differences)


def _differences(mixed: list[dict[str, Any]], reference: list[dict[str, Any]]) -> list[float]:
    pairs = zip(_logprobs(mixed), _logprobs(reference), strict=True)
    return [abs(ours - theirs) for ours, theirs in pairs]


def _logprobs(answers: list[dict[str, Any]]) -> list[float]:
    values = [value for answer in answers for value, *_ in answer["meta_info"]["input_token_logprobs"]]
    return [value for value in values if value is not None]


def differing_tokens(mixed: list[dict[str, Any]], reference: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """(prompt, position) where greedy tokens differ though the reference's two best are further apart than the bound.

    A prompt is compared up to its first near tie: after that the two contexts are not the same.
    """
    wrong = []
    for prompt, (a, b) in enumerate(zip(mixed, reference, strict=True)):
        for position, best in enumerate(b["meta_info"]["output_top_logprobs"]):
            if best[0][0] - best[1][0] <= BOUND:
                break
            if a["output_ids"][position] != b["output_ids"][position]:
                wrong.append((prompt, position))
                break
    return wrong
