"""On a GPU: serve maps on SGLang and compare with stock SGLang on the same weights dequantized to BF16.

    python scripts/gpu/compare.py examples/tiny/map.yaml [MORE.yaml ...]

Prints one JSON object a map: the largest difference of prompt log-probabilities, greedy tokens that differ, and the
proof's figures. Every engine runs in a process of its own.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.engine.comparison import REQUEST, differing_tokens, largest_difference, mean_difference  # noqa: E402
from tests.engine.conftest import TINY, Engine, held_out_prompts  # noqa: E402
from tests.engine.reference import write_reference  # noqa: E402

from sglang_mixed import make_plan  # noqa: E402

GPU: dict[str, Any] = {
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "cuda_graph_backend_prefill": "disabled",
    "enable_fp32_lm_head": True,
}


def compare(path: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        reference = write_reference(make_plan(path), Path(folder) / "reference")
        request = {"input_ids": held_out_prompts(), **REQUEST}
        mixed = {"enable_mixed_precision": True, "mixed_precision_config": path}
        engines = [
            Engine(Path(folder) / f"{name}.log", model, request, **GPU, **arguments)
            for name, model, arguments in (("mixed", TINY / "bf16", mixed), ("reference", reference, {}))
        ]
        ours, theirs = (engine.result() for engine in engines)
    answers = ours["answers"][0], theirs["answers"][0]
    kept = ("weight_bytes", "planned_bytes", "bf16_bytes", "bytes_read", "load_seconds", "by_format", "verification")
    return {
        "map": path,
        "largest_difference": largest_difference(*answers),
        "mean_difference": mean_difference(*answers),
        "differing_tokens": differing_tokens(*answers),
        **{key: ours["memory"][key] for key in kept},
    }


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        try:
            print(json.dumps(compare(argument)), flush=True)
        except AssertionError as error:
            print(json.dumps({"map": argument, "error": str(error)[-3000:]}), flush=True)
