"""What is supported, as rows that are each served and compared; `docs/support.md` is their table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from .mixes import MODELS, SOURCES

#: What `scripts/sglang_versions.py` has noted.
VERSIONS = Path(__file__).parents[2] / "docs" / "versions.jsonl"

LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "TP 2": {"tp_size": 2},
    "TP 2, EP 2": {"tp_size": 2, "ep_size": 2},
    "TP 4, EP 2": {"tp_size": 4, "ep_size": 2},
    "DP 2": {"dp_size": 2},
    "TP 2, DP 2": {"tp_size": 2, "dp_size": 2},
}


class Row(NamedTuple):
    """A model, how it is cut, and what it is mixed from."""

    model: str
    layout: str
    mix: str

    def __str__(self) -> str:
        return ", ".join(self)


ALL = "everything differs"
ROWS = [
    *(Row(model, "one rank", ALL) for model in MODELS if "," not in model),
    *(Row(model, layout, ALL) for model in ("qwen3_moe", "deepseek_v3") for layout in LAYOUTS if layout != "one rank"),
    Row("qwen2_moe", "TP 2", ALL),
    Row("qwen3_moe", "one rank", "three formats"),
    Row("qwen3_moe", "TP 2, EP 2", "three formats"),
    Row("qwen3_moe, 5 experts, top-1", "TP 2", ALL),
    Row("qwen3_moe, 12 experts, top-8", "TP 2, EP 2", ALL),
    Row("qwen3_moe, 96 wide", "TP 2", ALL),
    Row("gpt_oss", "TP 2", ALL),
    Row("qwen3_moe, experts fused in 16 bits", "one rank", ALL),
    Row("qwen3_moe, experts fused in 16 bits", "TP 2, EP 2", ALL),
]


def _version_row(run: dict[str, Any]) -> str:
    outcome = f"{run['passed']} passed" + (f", {run['failed']} failed" if run["failed"] else "")
    files = dict.fromkeys(Path(test.partition("::")[0]).stem.removeprefix("test_") for test in run["tests"])
    tests = ", ".join(files) + (" (some)" if "::" in "".join(run["tests"]) else "")
    torch = run["torch"].partition("+")[0]
    return f"| {run['sglang']} | {torch} | {run['transformers']} | {tests} | {outcome} | {run['date']} |"


def table() -> str:
    """The rows in Markdown."""
    lines = [
        "# What is served and compared",
        "",
        "Each row is a tiny model of random weights that SGLang serves on the CPU from several sources, and that stock",
        "SGLang serves, cut in the same way, from the same weights dequantized to BF16. The log-probabilities of 20",
        "prompts differ by at most 0.02, the greedy tokens are equal wherever the reference's two best are further",
        "apart, memory holds the planned bytes on every rank, and its SHA-256 are those of the files.",
        "`tests/engine/test_support.py` runs every row.",
        "",
        f'"everything differs" takes {len(SOURCES)} sources in turn ({", ".join(SOURCES)}):',
        "every expert's gate, up and down, and every part of a fused matrix, has another source than its neighbours.",
        '"three formats" gives half of the experts to FP8 and the others to GPTQ but for one in INT8, so that an EP',
        "rank lacks a format. The 16-bit source of GPT-OSS holds all experts of a layer in one tensor, and so do those",
        "that say so. Over EP ranks SGLang itself does not share these out: GPT-OSS is compared with itself on one",
        "rank, in `tests/engine/test_fused_experts.py`.",
        "",
        "| model | layout | mix |",
        "| --- | --- | --- |",
        *(f"| {row.model} | {row.layout} | {row.mix} |" for row in ROWS),
        "",
        "## SGLang's releases",
        "",
        "`python scripts/sglang_versions.py` runs tests of the engine beside each release, on the CPU: all rows above,",
        "and what the server reports, counts and refuses. 0.5.20 is the one of `make test`. A release that lacks a",
        "function which the plugin changes serves no map.",
        "",
        "| SGLang | torch | transformers | tests | outcome | date |",
        "| --- | --- | --- | --- | --- | --- |",
        *map(_version_row, map(json.loads, VERSIONS.read_text().splitlines())),
        "",
        "What fails there is SGLang's own doing: 0.5.15 computes GPT-OSS, as a stock one does, a little otherwise than",
        "transformers, so that some tokens go to other experts; 0.5.19 refuses it with attention in plain torch.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
