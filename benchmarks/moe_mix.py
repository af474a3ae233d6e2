"""What mixing costs on a CPU, one thread: against the byte-weighted sum of the times that its formats take alone.

64 experts of Qwen3-30B-A3B's size, half INT8 and half BF16, have a bar; its q, k and v in a format each have none.
The layers take turns and are larger together than the cache. Exits with 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent))
from measure import Timing, interleaved, report

from sglang_mixed.formats import ModuleFormat
from sglang_mixed.formats.fp8 import FP8Parameters
from sglang_mixed.formats.int8 import Int8Parameters
from sglang_mixed.formats.plain import PlainParameters
from sglang_mixed.kernels.compressed import CompressedWeight, NamedPart, compress
from sglang_mixed.kernels.experts import Expert, moe

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 2048, 768, 64, 4
QUERY, KEY = 4096, 512
BAR = 1.10
GENERATOR = torch.Generator().manual_seed(0)
Tensors = dict[str, torch.Tensor]
#: Hidden states, experts' numbers and their weights.
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def bf16(rows: int, columns: int) -> tuple[ModuleFormat, Tensors]:
    weight = torch.randn(rows, columns, generator=GENERATOR).mul_(0.03).bfloat16()
    return ModuleFormat("plain", PlainParameters("BF16", ("weight",)), (rows, columns)), {"weight": weight}


def int8(rows: int, columns: int) -> tuple[ModuleFormat, Tensors]:
    weight = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, generator=GENERATOR)
    parameters = Int8Parameters("channel", "scale", "F32", (rows, 1))
    return ModuleFormat("int8", parameters, (rows, columns)), {"weight": weight, "scale": torch.full((rows, 1), 4e-4)}


def fp8(rows: int, columns: int) -> tuple[ModuleFormat, Tensors]:
    weight = torch.randn(rows, columns, generator=GENERATOR).mul_(100).clamp_(-448, 448).to(torch.float8_e4m3fn)
    parameters = FP8Parameters("channel", None, "scale", "F32", (rows, 1))
    return ModuleFormat("fp8", parameters, (rows, columns)), {"weight": weight, "scale": torch.full((rows, 1), 3e-4)}


FORMATS = {"INT8": int8, "BF16": bf16, "FP8": fp8}


def matrices(columns: int, **parts: tuple[str, int]) -> list[CompressedWeight]:
    """Parts of a fused matrix, name -> (format, rows), as a layer holds them: neighbours that agree are one."""
    made = {name: FORMATS[label](rows, columns) for name, (label, rows) in parts.items()}
    found = []
    for weight, numbers in compress([NamedPart(name, made[name][0]) for name in parts]):
        received = [
            (index, local, one) for index in range(len(numbers)) for local, one in made[weight.names[index]][1].items()
        ]
        for index, local, _ in received:
            weight.expect(index, local)
        for tensor in received:
            weight.receive(*tensor)
        found.append(weight)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    ok = experts(repeats)
    attention(repeats)
    return 0 if ok else 1


def experts(repeats: int) -> bool:
    """Every second expert INT8, the others BF16; a token is sent to as many of these as of those."""
    made: dict[str, list[tuple[Expert, int]]] = {
        label: [expert(label) for _ in range(EXPERTS)] for label in ("INT8", "BF16")
    }
    layers = {label: [one for one, _ in each] for label, each in made.items()}
    layers["mixed"] = [layers[label][number] for number, label in enumerate(["INT8", "BF16"] * (EXPERTS // 2))]
    # Bytes of the format in the mix / bytes of the layer that is all of it.
    shares = {
        label: sum(size for _, size in each[start::2]) / sum(size for _, size in each)
        for start, (label, each) in enumerate(made.items())
    }
    verdicts = []
    for tokens in (1, 16, 128):
        batches = [batch(tokens) for _ in range(max(1, 16 // tokens))]
        runs = {label: functools.partial(forward, layer, batches) for label, layer in layers.items()}
        times = interleaved(runs, repeats, time.thread_time)
        verdicts.append(compare(f"{EXPERTS} experts, INT8 and BF16, {tokens} tokens", times, shares, BAR))
    return all(verdicts)


def expert(label: str) -> tuple[Expert, int]:
    """A random expert and its bytes."""
    gate_up = matrices(HIDDEN, gate=(label, INTERMEDIATE), up=(label, INTERMEDIATE))
    down = matrices(INTERMEDIATE, down=(label, HIDDEN))
    nbytes = sum(weight.nbytes for weight in gate_up + down)
    return Expert([weight.linear for weight in gate_up], down[0].linear), nbytes


def forward(layer: Sequence[Expert], batches: Sequence[Batch], _: int) -> None:
    for one in batches:
        moe(*one, layer)


def batch(tokens: int) -> Batch:
    """Hidden states, and the router's choice: half of it even experts, half odd ones, all equally likely."""
    halves = [torch.rand(tokens, EXPERTS // 2, generator=GENERATOR).topk(TOP_K // 2).indices * 2 for _ in range(2)]
    ids = torch.cat([halves[0], halves[1] + 1], 1)
    weights = torch.rand(tokens, TOP_K, generator=GENERATOR).softmax(1)
    return torch.randn(tokens, HIDDEN, generator=GENERATOR).bfloat16(), ids, weights


def attention(repeats: int, copies: int = 6) -> None:
    """q, k and v in a format each, and in one."""
    mixes = {"split": tuple(FORMATS), **{label: (label,) * 3 for label in FORMATS}}
    layers: dict[str, list[list[CompressedWeight]]] = {
        name: [
            matrices(HIDDEN, **dict(zip("qkv", zip(labels, (QUERY, KEY, KEY), strict=True), strict=True)))
            for _ in range(copies)
        ]
        for name, labels in mixes.items()
    }
    shares = {
        label: part.nbytes / layers[label][0][0].nbytes for label, part in zip(FORMATS, layers["split"][0], strict=True)
    }
    for tokens in (1, 16, 128):
        x = torch.randn(tokens, HIDDEN, generator=GENERATOR).bfloat16()
        runs = {name: lambda turn, each=each, x=x: product(each[turn % copies], x) for name, each in layers.items()}
        times = interleaved(runs, 6 * repeats, time.thread_time)
        name = f"q INT8, k BF16, v FP8, {tokens} tokens"
        compare(name, {"mixed": times.pop("split"), **times}, shares, None)


def product(weights: Sequence[CompressedWeight], x: torch.Tensor) -> torch.Tensor:
    outputs = [weight.linear(x) for weight in weights]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


def compare(name: str, times: Mapping[str, Timing], shares: Mapping[str, float], bar: float | None) -> bool:
    """Report mixed / byte-weighted sum (best and median times), and mixed / each format alone."""
    mixed = times["mixed"]
    weighted = Timing(*(sum(times[label][which] * share for label, share in shares.items()) for which in range(2)))
    for label in shares:
        report(
            name, mixed.minimum / times[label].minimum, "x", f"all {label}, {times[label].minimum * 1e3:.2f} ms", None
        )
    report(f"{name}, median", mixed.median / weighted.median, "x", "byte-weighted sum", None)
    baseline = f"byte-weighted sum of the formats alone, {weighted.minimum * 1e3:.2f} ms"
    return report(name, mixed.minimum / weighted.minimum, "x", baseline, bar)


if __name__ == "__main__":
    sys.exit(main())
