"""Compile our Triton kernels for sm_90 without a GPU and tell what they take of it.

    python benchmarks/kernels.py [--only FORMATS ...] [--target 90] [--write]

Compiled is what `GroupedExperts` and `DecodedLinear` launch, for Qwen3-30B-A3B's experts (768 x 2048), and what hashes
for the proof. Prints one JSON object a kernel and fails where registers spill; `--write` renews the Markdown beside it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from sglang_mixed.engine.loading.hashing import leaves_of
from sglang_mixed.formats import ModuleFormat
from sglang_mixed.formats.awq import AWQParameters
from sglang_mixed.formats.fp8 import FP8Parameters
from sglang_mixed.formats.gptq import GPTQParameters
from sglang_mixed.formats.int8 import Int8Parameters
from sglang_mixed.formats.mxfp4 import MXFP4Parameters
from sglang_mixed.formats.nvfp4 import NVFP4Parameters
from sglang_mixed.formats.packed import PackedParameters
from sglang_mixed.formats.plain import PlainParameters
from sglang_mixed.kernels import sha256
from sglang_mixed.kernels.grouped import experts, launch, linear, parts, passes
from sglang_mixed.kernels.grouped.codec import Codec, codec_of
from sglang_mixed.kernels.grouped.table import Weight

HIDDEN, INTERMEDIATE, TOP_K = 2048, 768, 8
#: What is launched for columns in parts, and for weights of 8, 16 and more rows; linears of 32 rows have tiles too.
TOKENS = 1, 16, 32, 2048
#: And for routers.
ROUTER_ROWS, ROUTER_OUTPUTS = (1, 16, 64), 128
GPTQ4 = GPTQParameters(4, 128, True, False, False, 1, "F16")
#: Name -> a format's name and parameters; of each way in which the kernels read a weight at least one.
FORMATS: dict[str, tuple[str, Any]] = {
    "BF16": ("plain", PlainParameters("BF16", ("weight",), ())),
    "FP8 128x128": ("fp8", FP8Parameters("block", (128, 128), "weight_scale_inv", "F32", (6, 16))),
    "FP8 channel": ("fp8", FP8Parameters("channel", None, "weight_scale", "BF16", (768, 1))),
    "MXFP8": ("fp8", FP8Parameters("block", (1, 32), "weight_scale", "U8", (768, 64))),
    "INT8 channel": ("int8", Int8Parameters("channel", "weight_scale", "F32", (768, 1))),
    "GPTQ int4 g128": ("gptq", GPTQ4),
    "GPTQ int4 g32": ("gptq", replace(GPTQ4, group_size=32)),
    "GPTQ int4 row": ("gptq", replace(GPTQ4, group_size=1 << 20)),
    "GPTQ int4 g128 asym": ("gptq", replace(GPTQ4, symmetric=False)),
    "GPTQ int4 g128 act-order": ("gptq", replace(GPTQ4, act_order=True)),
    "GPTQ int2 g128": ("gptq", replace(GPTQ4, bits=2)),
    "GPTQ int3 g128": ("gptq", replace(GPTQ4, bits=3)),
    "GPTQ int8 g128 asym": ("gptq", replace(GPTQ4, bits=8, symmetric=False)),
    "AWQ int4 g32": ("awq", AWQParameters(4, 32, "F16")),
    "AWQ int4 g128": ("awq", AWQParameters(4, 128, "F16")),
    "CT int4 g128": ("packed", PackedParameters(4, "group", 128, True, False, "BF16")),
    "CT int7 g128 asym": ("packed", PackedParameters(7, "group", 128, False, False, "BF16")),
    "NVFP4": ("nvfp4", NVFP4Parameters("modelopt", ("F32", ()))),
    "MXFP4": ("mxfp4", MXFP4Parameters("weight", "U8", "weight_scale", "U8")),
}
MIXES = {
    "FP8 128x128 + GPTQ int4 g128": ("FP8 128x128", "GPTQ int4 g128"),
    "BF16, FP8, INT8, GPTQ, AWQ": ("BF16", "FP8 128x128", "INT8 channel", "GPTQ int4 g128", "AWQ int4 g128"),
}
#: All that is launched.
KERNELS = {
    passes: ("sort_pairs", "gate_up", "down", "sum_slots", "linear"),
    parts: ("gate_up_parts", "down_parts", "linear_parts"),
    sha256: ("hash_pieces",),
}
#: Those that do not depend on formats.
COMMON = ("hash_pieces", "sort_pairs", "sum_slots")


class Absent:
    """In place of Triton's driver: a GPU that kernels are compiled for, and that is not there."""

    target = GPUTarget("cuda", 90, 32)
    get_current_target = staticmethod(lambda: Absent.target)
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)


class Compiled:
    """In place of a kernel: compiles what it would launch."""

    def __init__(self, kernel: Any, found: list[tuple[str, int, Any]]) -> None:
        self._kernel, self._found = kernel, found

    def __getitem__(self, grid: Any) -> Any:
        def compile(*arguments: Any, **named: Any) -> None:
            compiled = self._kernel.warmup(*arguments, grid=grid, **named)
            self._found.append((self._kernel.fn.__name__, named.get("BLOCK_M", 0), compiled))

        return compile


@contextmanager
def compiling() -> Iterator[list[tuple[str, int, Any]]]:
    """Launches inside compile for the target instead; yields (kernel, rows of a program, what was compiled)."""
    found: list[tuple[str, int, Any]] = []
    kernels = [(module, name, getattr(module, name)) for module, names in KERNELS.items() for name in names]
    dot_type, overlaps = launch.dot_type, launch.overlaps
    driver.set_active(Absent())  # for good: without a GPU there is none to go back to
    triton.next_power_of_2 = launch.next_power_of_2  # as SGLang does: kernels can no longer call it
    try:
        for module, name, kernel in kernels:
            setattr(module, name, Compiled(kernel, found))
        launch.dot_type = lambda x: launch.TYPES[x.dtype]
        launch.overlaps = lambda x: Absent.target.arch >= 90
        yield found
    finally:
        for module, name, kernel in kernels:
            setattr(module, name, kernel)
        launch.dot_type, launch.overlaps = dot_type, overlaps


def codec(name: str, rows: int, columns: int) -> Codec:
    """A format's codec for a weight of this shape."""
    kind, parameters = FORMATS[name]
    return codec_of(ModuleFormat(kind, parameters, (rows, columns)))


def weight(name: str, rows: int, columns: int) -> Weight:
    """A weight that is nowhere."""
    return Weight(codec(name, rows, columns), {"weight": torch.empty(0)})


def compile_experts(names: tuple[str, ...], tokens: int) -> list[tuple[str, int, Any]]:
    """A layer of some experts a format, for as many tokens."""
    layer = experts.GroupedExperts(
        [
            experts.ExpertWeights(
                weight(name, INTERMEDIATE, HIDDEN),
                weight(name, INTERMEDIATE, HIDDEN),
                weight(name, HIDDEN, INTERMEDIATE),
            )
            for name in names * (2 * TOP_K)
        ],
        HIDDEN,
        INTERMEDIATE,
        experts.Activation(),
    )
    with compiling() as found:
        ids = torch.zeros(tokens, TOP_K, dtype=torch.int32)
        layer.run(torch.zeros(tokens, HIDDEN, dtype=torch.bfloat16), torch.zeros(tokens, TOP_K), ids)
    return found


def compile_linear(name: str, rows: int, outputs: int = INTERMEDIATE) -> list[tuple[str, int, Any]]:
    """A linear layer, for as many rows."""
    with compiling() as found:
        layer = linear.DecodedLinear(weight(name, outputs, HIDDEN), outputs, HIDDEN)
        layer.run(torch.zeros(rows, HIDDEN, dtype=torch.bfloat16))
    return found


def compile_hashes() -> list[tuple[str, int, Any]]:
    """Of the proof."""
    with compiling() as found:
        leaves_of([torch.zeros(1)])
    return found


def usage(compiled: Any) -> dict[str, int]:
    """Registers of a thread, bytes that they spill, bytes of shared memory, and loads of 16 bytes past registers."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {
        "registers": found["REG"],
        "spilled": found["STACK"] + found["LOCAL"],
        "shared": compiled.metadata.shared,
        "wide_loads": len(re.findall(r"cp\.async\.cg\.shared\.global[^;]*0x10", compiled.asm["ptx"])),
    }


def lines(only: list[str]) -> Iterator[dict[str, Any]]:
    """One a kernel; those that do not depend on the formats once."""
    seen: set[str] = set()
    for name, kernel, rows, compiled in compile_all(only):
        common = kernel in COMMON
        if common and f"{kernel} {rows}" in seen:
            continue
        seen.add(f"{kernel} {rows}")
        yield {"kernel": kernel, "formats": "any" if common else name, "rows": rows, **usage(compiled)}


def compile_all(only: list[str]) -> Iterator[tuple[str, str, int, Any]]:
    """(formats, kernel, rows of a program, what was compiled) of what hashes, and of layers of each format and mix."""
    yield from (("any", *one) for one in compile_hashes())
    alone = {name: (name,) for name in FORMATS}
    for name, formats in (alone | MIXES).items():
        for tokens in TOKENS if not only or name in only else ():
            found = compile_experts(formats, tokens) + (compile_linear(name, tokens) if name in alone else [])
            yield from ((name, *one) for one in found)
    for rows in ROUTER_ROWS if not only or "BF16" in only else ():
        yield from (("BF16 router", *one) for one in compile_linear("BF16", rows, ROUTER_OUTPUTS))


def table(found: list[Mapping[str, Any]]) -> str:
    """Markdown."""
    head = ("kernel", "formats", "rows of a program", "registers", "bytes spilled", "bytes of shared memory")
    text = [
        "# Our Triton kernels on sm_90",
        "",
        f"`python benchmarks/kernels.py --write`, {datetime.date.today()}, Triton {triton.__version__}.",
        "Compiled without a GPU, not run: what is launched for Qwen3-30B-A3B's experts (768 x 2048, BF16 activations).",
        "Spills must be 0. Wide loads bring 16 bytes a thread to shared memory while products run.",
        "",
        f"| {' | '.join(head)} | wide loads |",
        f"|{' --- |' * 7}",
    ]
    return "\n".join([*text, *(f"| {' | '.join(str(value) for value in line.values())} |" for line in found)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], metavar="FORMATS", help="Names of the table's second column.")
    parser.add_argument("--target", type=int, default=90, help="A GPU's compute capability, times ten.")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    Absent.target = GPUTarget("cuda", arguments.target, 32)
    found = []
    for line in lines(arguments.only):
        print(json.dumps({"measure": "kernel", **line, "ok": not line["spilled"]}), flush=True)
        found.append(line)
    if arguments.write:
        (Path(__file__).parent / "kernels.md").write_text(table(found))
    sys.exit(any(line["spilled"] for line in found))


if __name__ == "__main__":
    main()
