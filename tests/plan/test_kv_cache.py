"""Bytes of a token's keys and values, and the share of a GPU's memory, by SGLang 0.5.20's formulas."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_mixed.errors import UnsupportedError
from sglang_mixed.plan.kv_cache import cache_item_bytes, default_mem_fraction, kv_cache

GROUPED = {"num_hidden_layers": 94, "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128}
LATENT = {"num_hidden_layers": 61, "num_attention_heads": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
OSS = {
    "architectures": ["GptOssForCausalLM"],
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "layer_types": ["sliding_attention", "full_attention"] * 18,
}
NO_HEAD_DIM = {"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32}
LLAMA4 = {"architectures": ["Llama4ForConditionalGeneration"], "text_config": {**GROUPED, "num_hidden_layers": 48}}


@pytest.mark.parametrize(
    ("config", "tp", "dtype", "expected"),
    [
        (GROUPED, 1, "auto", 94 * 4 * 256 * 2),
        (GROUPED, 4, "fp8_e4m3", 94 * 1 * 256),
        (GROUPED, 8, "auto", 94 * 1 * 256 * 2),  # two ranks hold the same head
        (LATENT, 1, "auto", 61 * 576 * 2),
        (LATENT, 8, "fp8", 61 * 576),  # every rank holds all of it
        (OSS, 2, "bf16", (18 + 0.8 * 18) * 4 * 128 * 2),
        (NO_HEAD_DIM, 1, "auto", 32 * 32 * 256 * 2),
        (LLAMA4, 1, "auto", (12 + 0.8 * 36) * 4 * 256 * 2),
    ],
)
def test_bytes_of_a_token(config: dict[str, Any], tp: int, dtype: str, expected: float) -> None:
    assert kv_cache(config, tp, cache_item_bytes(dtype)).bytes_per_token == pytest.approx(expected)


def test_a_float32_model_keeps_float32_unless_told() -> None:
    assert [cache_item_bytes(dtype, 4) for dtype in ("auto", "bf16", "fp8_e5m2")] == [4, 2, 1]
    with pytest.raises(UnsupportedError, match="one of auto"):
        cache_item_bytes("int3")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"layer_types": ["linear_attention"]}, "linear_attention"),
        ({"index_head_dim": 128}, "index_head_dim"),
        ({"architectures": ["Gemma4ForCausalLM"]}, "Gemma4ForCausalLM"),
    ],
)
def test_other_kinds_of_attention_are_not_guessed(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedError, match=named):
        kv_cache({**GROUPED, **change})


def test_the_share_of_weights_and_cache_is_sglangs() -> None:
    # An H100 as nvidia-smi shows it: 512 + 1.5 x 8192 + 128 + 2 x 256 + 8 x 58 of 81,559 MiB are kept.
    assert default_mem_fraction(81_559 << 20, 1) == round((81_559 - 13_904) / 81_559, 3)
    assert default_mem_fraction(24 << 30, 4) == round((24_576 - (512 + 6144 + 512 + 320 + 400)) / 24_576, 3)
    assert default_mem_fraction(1 << 30, 1) == 0
