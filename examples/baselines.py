"""Perplexity of BF16 (stock SGLang) and of all-Int4 on the held-out text; prints one JSON object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import sglang
from perplexity import REQUEST, perplexity, windows

TINY = Path(__file__).parent / "tiny"


def measure(prompts: list[list[int]], **arguments: Any) -> float:
    engine = sglang.Engine(model_path=str(TINY / "bf16"), mem_fraction_static=0.2, max_total_tokens=16384, **arguments)
    try:
        return perplexity(prompts, lambda ids: engine.generate(input_ids=ids, **REQUEST))
    finally:
        engine.shutdown()


if __name__ == "__main__":
    held_out = windows(TINY / "bf16", TINY / "heldout.txt")
    bf16 = measure(held_out)
    int4 = measure(held_out, enable_mixed_precision=True, mixed_precision_config=str(TINY / "int4.yaml"))
    print(json.dumps({"bf16": bf16, "int4": int4}))
