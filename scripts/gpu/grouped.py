"""On a GPU: our own Triton kernels against float64, every format alone and all in one layer, in BF16 and FP16.

    python scripts/gpu/grouped.py [--only WORD ...]

The checks are those that the tests run in Triton's interpreter. Prints one JSON object a check. Needs no SGLang.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "kernels"), str(ROOT / "tests" / "formats")]

import grouped_checks  # noqa: E402
from grouped_cases import FORMATS  # noqa: E402

from sglang_mixed.formats.slicing import Region  # noqa: E402

#: Of the worst column at 64 and more rows, and of the whole output.
WORST_COLUMN, WHOLE = 1e-4, 1e-5
#: A sum of 16-bit experts' hidden values is rounded twice.
WHOLE_OF_EXPERTS = 2e-5
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
MIXED = ["gptq", "fp8 128x128", "awq", "int8 channel", "plain", "packed", "gptq g128 v2", "awq g64", "nvfp4"]
SWIGLU = {"activation": ("swiglu", 1.702, 7.0), "biased": True}
ALL = [*FORMATS, *list(FORMATS)[: -len(FORMATS) % 3]]
#: Of Qwen3-30B-A3B, which few tokens are cut for.
REAL = {"sizes": (2048, 768), "top_k": 8}
LAYERS: dict[str, tuple[list[str], int, dict[str, Any]]] = {
    "all formats": (ALL, 66, {"top_k": 2, "reorders": True}),
    "two tokens": (MIXED, 2, {"top_k": 2}),
    "gate and up alike": ([name for name in MIXED for _ in range(3)], 70, {"top_k": 2, "reorders": True}),
    "decode": (MIXED * 2, 12, {"top_k": 2, "reorders": True}),
    "prefill": (MIXED, 300, {"top_k": 1, "reorders": True}),
    "in turns": (MIXED, 70, {"top_k": 1, "at_once": 48}),
    "whole steps": (MIXED, 70, {"sizes": (512, 256), "top_k": 2, "reorders": True}),
    "gelu": (MIXED, 70, {"top_k": 1, "activation": ("gelu",)}),
    "gpt-oss": (["mxfp4"] * 3 + MIXED, 70, {"top_k": 2, **SWIGLU}),
    **{f"{name}, alike": ([name] * 9, 130, {"sizes": (256, 128), "top_k": 2}) for name in FORMATS},
    "one pair in parts": (MIXED, 1, {"top_k": 1, "skips": False, "parts": (3, 2)}),
    "most pairs in parts": (MIXED * 3, 4, {"top_k": 8, "parts": (4, 3), "reorders": True}),
    "all formats in parts": (ALL, 16, {"top_k": 2, "parts": (3, 2), "reorders": True}),
    "only down in parts": (MIXED, 8, {"top_k": 2, "parts": (1, 3)}),
    "gelu in parts": (MIXED, 8, {"top_k": 2, "activation": ("gelu",), "biased": True, "parts": (2, 2)}),
    "gpt-oss in parts": (["mxfp4"] * 3 + MIXED, 8, {"top_k": 2, "parts": (2, 3), **SWIGLU}),
    "one real token": (MIXED * 3, 1, {"skips": False, **REAL}),
    "two real tokens": (MIXED * 3, 2, {"reorders": True, **REAL}),
    **{
        f"{name}, in parts": ([name] * 12, 4, {"sizes": (512, 256), "top_k": 3, "parts": (4, 2), "reorders": True})
        for name in FORMATS
    },
}
#: Layers that are also captured.
REPLAYED = ("decode", "prefill", "gate and up alike", "two real tokens")


def linear(name: str, dtype: str) -> Iterator[dict[str, Any]]:
    """A format alone: many rows, few, whole steps, a rank's share, and few rows in parts."""
    odd = (83, 145) if name.startswith(("plain", "fp8", "int8", "mxfp8")) else (32, 160)
    shapes = {"many": (odd, 200, None), "few": (odd, 3, None), "whole steps": ((192, 384), 64, None)}
    share = Region((8, 74), (24, 130))
    shapes |= {"share": ((96, 160), 64, share), "share in parts": ((96, 160), 16, share)}
    for case, (shape, rows, region) in (shapes | {"in parts": (odd, 3, None)}).items():
        parts = 3 if case.endswith("in parts") else None
        worst, whole = grouped_checks.linear(name, shape, rows, region, DTYPES[dtype], parts)
        good = whole <= WHOLE and (rows < 64 or worst <= WORST_COLUMN)
        yield {"check": f"linear, {case}", "format": name, "dtype": dtype, "worst": worst, "whole": whole, "ok": good}


def layer(name: str, dtype: str) -> Iterator[dict[str, Any]]:
    """A layer of experts, in which guards surround every tensor that kernels write."""
    formats, tokens, options = LAYERS[name]
    found = grouped_checks.experts(formats, tokens, dtype=DTYPES[dtype], **options)
    close = found["whole"] <= WHOLE_OF_EXPERTS and (tokens < 64 or found["worst"] <= WORST_COLUMN)
    good = close and found["guarded"] and found["skipped"] and found["reordered"] == 0
    yield {"check": f"experts, {name}", "dtype": dtype, **found, "ok": good}


def replay(name: str, dtype: str) -> Iterator[dict[str, Any]]:
    """A layer captured with one routing and replayed with another, against a run of its own."""
    formats, tokens, options = LAYERS[name]
    sizes, top_k = options.get("sizes", (160, 96)), options["top_k"]
    experts = grouped_checks.Layer(formats, *sizes, grouped_checks.Activation(), False, DTYPES[dtype])
    held = grouped_checks.inputs(tokens, sizes[0], experts.number, top_k, DTYPES[dtype])
    for _ in range(2):
        experts.layer.run(*held)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = experts.layer.run(*held)
    order = torch.randperm(tokens, device=held[0].device)
    for tensor in held:
        tensor.copy_(tensor[order])
    graph.replay()
    same = bool(torch.equal(output, experts.layer.run(*held))) and bool(output.any())
    yield {"check": f"experts, {name}, replayed", "dtype": dtype, "ok": same}


KINDS = {"linear": linear, "experts": layer, "replay": replay}


def run(kind: str, name: str, dtype: str) -> list[dict[str, Any]]:
    try:
        return list(KINDS[kind](name, dtype))
    except Exception as error:
        return [{"check": f"{kind}, {name}", "dtype": dtype, "error": f"{type(error).__name__}: {str(error)[-600:]}"}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="Words of what is checked: linear, parts, replay, ...")
    options = parser.parse_args()
    wanted = [("experts", name, dtype) for name in LAYERS for dtype in DTYPES]
    wanted += [("replay", name, dtype) for name in REPLAYED for dtype in DTYPES]
    wanted += [("linear", name, dtype) for name in FORMATS for dtype in DTYPES]
    wanted = [one for one in wanted if not options.only or any(word in f"{one[0]} {one[1]}" for word in options.only)]
    failed = 0
    # What takes time is Triton's compiler.
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        for future in [pool.submit(run, *one) for one in wanted]:
            for line in future.result():
                failed += not line.get("ok")
                print(json.dumps(line), flush=True)
    print(json.dumps({"check": "all", "failed": failed}))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
