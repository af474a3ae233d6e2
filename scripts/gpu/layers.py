"""On a GPU: single layers of ours on SGLang's real kernels, against float64, outside of an engine.

    python scripts/gpu/layers.py

Prints one JSON object a check: the normalized squared error of the worst output column, or of all with few tokens.
Experts: each format alone, in a mix with ids of -1, cut inside its groups over four ranks, and replayed from a CUDA
graph with other routing.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.engine.gpu_model import start_sglang  # noqa: E402
from tests.engine.launch import TINY  # noqa: E402
from tests.engine.layers import HIDDEN, PREFIX, WRITERS, experts, fill, write_experts  # noqa: E402
from tests.models import write_map  # noqa: E402

from sglang_mixed.plan import Plan, Rank, RankPlan, make_plan  # noqa: E402

EXPERTS, INTERMEDIATE, TOP_K = 4, 192, 2
DEVICE, DTYPE = "cuda", torch.bfloat16
ATTENTION = "model.layers.0.self_attn"
#: Of the worst column: 16-bit products, and those of activations in 8 bits. One doubled scale of four: 1e-1.
BOUND, BOUND_8_BITS = 1e-4, 1e-2


class Layers:
    """Plans over small checkpoints, each written once, and what our methods make of them on the GPU."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.written = cache(lambda kind: write_experts(folder / kind, kind, intermediate=INTERMEDIATE))

    def plan(self, mapping: dict[str, str]) -> Plan:
        """Pattern -> kind of checkpoint; the rest is BF16."""
        names = {kind: f"source_{number}" for number, kind in enumerate(dict.fromkeys(("bf16", *mapping.values())))}
        sources = {name: self.written(kind) for kind, name in names.items()}
        named = {pattern: names[kind] for pattern, kind in mapping.items()}
        return make_plan(write_map(self._folder, named, default="source_0", **sources))

    def qkv(self, plan: RankPlan) -> Callable[[torch.Tensor], torch.Tensor]:
        """The fused layer's function."""
        from sglang_mixed.engine.layers.split_linear import SplitLinear

        parts = [plan.plan.modules[f"{ATTENTION}.{part}_proj"] for part in "qkv"]
        rows = [part.format.shape[0] for part in parts]
        method, layer = SplitLinear(parts), torch.nn.Module()

        def build() -> None:
            with torch.device(DEVICE):
                method.create_weights(layer, HIDDEN, rows, HIDDEN, sum(rows), DTYPE)

        fill(plan, build)
        method.process_weights_after_loading(layer)
        return lambda x: method.apply(layer, x)


def weight(plan: Plan, name: str) -> torch.Tensor:
    """float64 on the GPU, by the format's exact reference."""
    return plan.checkpoints[plan.modules[name].source].dequantize(name).to(DEVICE).double()


def reference(plan: Plan, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """float64 [tokens, hidden]; an id of -1 adds nothing."""
    output = torch.zeros(len(x), HIDDEN, dtype=torch.float64, device=DEVICE)
    for expert in range(EXPERTS):
        gate, up, down = (weight(plan, f"{PREFIX}.{expert}.{part}_proj") for part in ("gate", "up", "down"))
        each = (torch.nn.functional.silu(x.double() @ gate.T) * (x.double() @ up.T)) @ down.T
        output += each * (weights.double() * (ids == expert)).sum(1, keepdim=True)
    return output


def worst_column(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Normalized squared error; of few rows the mean of all columns, since a value may be near zero."""
    energy, error = expected.square().sum(0), (found.double() - expected).square().sum(0)
    return float((error / energy).max() if len(expected) >= 64 else error.sum() / energy.sum())


def inputs(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, top-k weights and distinct ids."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    x = torch.randn(tokens, HIDDEN, generator=generator, device=DEVICE).to(DTYPE)
    scores = torch.rand(tokens, EXPERTS, generator=generator, device=DEVICE)
    weights, ids = scores.topk(TOP_K)
    return x, weights.contiguous(), ids.to(torch.int32).contiguous()


def alone(layers: Layers, kind: str, tokens: int) -> float:
    plan = layers.plan({f"{PREFIX}.*.*": kind})
    x, weights, ids = inputs(tokens)
    return worst_column(experts(plan.rank(), DEVICE)(x, weights, ids), reference(plan, x, weights, ids))


def mixed(layers: Layers, kind: str, tokens: int) -> float:
    plan = layers.plan({f"{PREFIX}.1.*": kind, f"{PREFIX}.2.*": "int8"})
    x, weights, ids = inputs(tokens)
    if tokens > 1:
        ids[::3, 1] = -1
        ids[1] = -1
    return worst_column(experts(plan.rank(), DEVICE)(x, weights, ids), reference(plan, x, weights, ids))


def cut(layers: Layers, kind: str, tokens: int) -> float:
    """192 columns on four ranks: 48 each, inside blocks and groups."""
    plan = layers.plan({f"{PREFIX}.*.*": kind})
    x, weights, ids = inputs(tokens)
    ranks = [experts(plan.rank(Rank(4, 1, number)), DEVICE)(x, weights, ids) for number in range(4)]
    return worst_column(torch.stack(ranks).double().sum(0), reference(plan, x, weights, ids))


def replayed(layers: Layers, kind: str, tokens: int) -> float:
    """Captured with one routing, replayed with another, in which some experts have no token."""
    plan = layers.plan({f"{PREFIX}.1.*": kind, f"{PREFIX}.2.*": "int8"})
    run, (x, weights, ids) = experts(plan.rank(), DEVICE), inputs(tokens)
    for _ in range(2):
        run(x, weights, ids)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run(x, weights, ids)
    others = inputs(tokens, seed=1)
    for held, other in zip((x, weights, ids), others, strict=True):
        held.copy_(other)
    ids[ids == 3] = -1
    graph.replay()
    return worst_column(output, reference(plan, x, weights, ids))


def linear(layers: Layers, kind: str, tokens: int) -> float:
    plan = layers.plan({f"{ATTENTION}.q_proj": kind, f"{ATTENTION}.k_proj": kind, f"{ATTENTION}.v_proj": "int8"})
    x = inputs(tokens)[0]
    expected = torch.cat([x.double() @ weight(plan, f"{ATTENTION}.{part}_proj").T for part in "qkv"], dim=1)
    return worst_column(layers.qkv(plan.rank())(x), expected)


def checks() -> Iterator[tuple[str, str, int, Callable[[Layers, str, int], float]]]:
    """(name, format, tokens, what to measure)."""
    for kind in ("bf16", *WRITERS):
        for tokens in (1, 5, 200):
            yield "experts alone", kind, tokens, alone
        for tokens in (1, 64):
            yield "experts mixed", kind, tokens, mixed
        if kind not in ("bf16", "gptq-act-order"):
            yield "experts cut inside units", kind, 64, cut
        yield "experts replayed", kind, 8, replayed
        for tokens in (1, 64):
            yield "split qkv", kind, tokens, linear


def main() -> None:
    from sglang.srt.server_args import ServerArgs

    torch.cuda.set_device(0)
    arguments = {"attention_backend": "triton", "sampling_backend": "pytorch", "device": DEVICE}
    start_sglang(ServerArgs(model_path=str(TINY / "bf16"), **arguments), "nccl")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        layers = Layers(Path(folder))
        for name, kind, tokens, measure in checks():
            line: dict[str, Any] = {"check": name, "format": kind, "tokens": tokens}
            try:
                error = measure(layers, kind, tokens)
                joined = name in ("experts mixed", "experts replayed", "split qkv")  # with INT8
                eight_bits = joined or kind.startswith(("fp8", "int8"))
                bound = BOUND_8_BITS if eight_bits else BOUND
                line |= {"worst_column_nmse": error, "bound": bound, "ok": error <= bound}
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                line |= {"error": f"{type(error).__name__}: {str(error)[:400]} ({where.filename[-60:]}:{where.lineno})"}
            print(json.dumps(line), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
