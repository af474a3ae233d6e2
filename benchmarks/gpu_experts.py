"""What a mixed MoE layer costs on a GPU: one layer of Qwen3-30B-A3B, 25 % of its experts FP8 and 75 % Int4.

    python benchmarks/gpu_experts.py

Against the byte-weighted sum of the times that SGLang's kernels take for layers of one format. Each kernel's layers run
as they are served, replayed from CUDA graphs in turns; routings are random and take turns, so that weights come from
memory. Prints one JSON object a measure, and exits with 1 if a bar is missed.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from measure import report  # noqa: E402
from synthetic import REAL_SIZES, write, write_map  # noqa: E402
from tests.engine.gpu_model import start_sglang  # noqa: E402
from tests.engine.layers import PREFIX, ExpertsRun, experts  # noqa: E402

from sglang_mixed import make_plan  # noqa: E402

TOKENS, TOLD, ROUTINGS, REPEATS, BAR = (1, 4, 16, 64, 256), (1024, 4096), 8, 15, 1.10
HIDDEN, EXPERTS, TOP_K = (REAL_SIZES[name] for name in ("hidden_size", "num_experts", "num_experts_per_tok"))
#: Experts of the first source; the others are Int4.
SHARES = {"fp8": 1.0, "int4": 0.0, "mixed": 0.25}
#: What runs them: `SGLANG_MIXED_TRITON`.
KERNELS = {"SGLang's": "needed", "ours": "all"}
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def inputs(tokens: int) -> list[Inputs]:
    """Hidden states, top-k weights and ids, for each routing."""
    generator = torch.Generator("cuda").manual_seed(tokens)
    found = []
    for _ in range(ROUTINGS):
        scores = torch.rand(tokens, EXPERTS, generator=generator, device="cuda")
        weights, ids = scores.topk(TOP_K)
        x = torch.randn(tokens, HIDDEN, generator=generator, device="cuda").bfloat16()
        found.append((x, (weights / weights.sum(1, keepdim=True)).contiguous(), ids.to(torch.int32).contiguous()))
    return found


def captured(run: ExpertsRun, given: list[Inputs]) -> Callable[[], None]:
    """Replays the layer once a routing."""
    for one in given[:2]:
        run(*one)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for one in given:
            run(*one)
    return graph.replay


def seconds(run: Callable[[], object]) -> float:
    """Of one run on the GPU, by its own clock."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def microseconds(replays: dict[tuple[str, str], Callable[[], None]]) -> dict[tuple[str, str], float]:
    """Of one run of each layer; the layers take turns."""
    found: dict[tuple[str, str], list[float]] = {key: [] for key in replays}
    for _ in range(REPEATS):
        for key, replay in replays.items():
            found[key].append(seconds(replay) * 1e6 / ROUTINGS)
    return {key: statistics.median(times[3:]) for key, times in found.items()}


def copy_bandwidth() -> float:
    """Bytes read and written in a second."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(seconds(lambda: target.copy_(source)) for _ in range(5))


def touched_bytes(given: list[Inputs], share: float) -> float:
    """Bytes of weights that a routing reads, on average."""
    fp8, int4 = 3 * HIDDEN * REAL_SIZES["moe_intermediate_size"], 3 * HIDDEN * REAL_SIZES["moe_intermediate_size"] / 2
    total = 0.0
    for _, _, ids in given:
        used = ids.unique()
        first = int((used < share * EXPERTS).sum())
        total += first * fp8 * (1 + 4 / 128**2) + (len(used) - first) * int4 * (1 + 4 / 128)
    return total / len(given)


def main() -> int:
    from sglang.srt.server_args import ServerArgs

    torch.cuda.set_device(0)
    bandwidth = copy_bandwidth()
    print(json.dumps({"device": torch.cuda.get_device_name(), "copy_bytes_per_second": round(bandwidth)}), flush=True)
    ok, layers = True, {}
    with tempfile.TemporaryDirectory(dir="/dev/shm") as temporary, torch.no_grad():
        folder = Path(temporary)
        sources = {
            name: write(folder / name, kind, 1, "cuda", **REAL_SIZES)
            for name, kind in (("int4", "gptq"), ("fp8", "fp8"))
        }
        arguments = {"attention_backend": "triton", "sampling_backend": "pytorch", "device": "cuda"}
        start_sglang(ServerArgs(model_path=str(sources["int4"]), **arguments), "nccl")
        for formats, share in SHARES.items():
            rules = {f"{PREFIX}.{{0..{int(share * EXPERTS) - 1}}}.*": "fp8"} if share else {}
            plan = make_plan(write_map(folder / "map.yaml", rules, **sources)).rank()
            for kernels, wish in KERNELS.items():
                os.environ["SGLANG_MIXED_TRITON"] = wish
                layers[kernels, formats] = experts(plan, "cuda")
        for tokens in TOKENS + TOLD:
            given = inputs(tokens)
            times = microseconds({key: captured(run, given) for key, run in layers.items()})
            for (kernels, formats), time in times.items():
                rate = touched_bytes(given, SHARES[formats]) / time * 1e6 / bandwidth
                line = {"tokens": tokens, "kernels": kernels, "formats": formats, "microseconds": round(time, 1)}
                print(json.dumps({**line, "of_copy_bandwidth": round(rate, 3)}), flush=True)
            weighted = 0.25 * times["SGLang's", "fp8"] + 0.75 * times["SGLang's", "int4"]
            baseline = f"byte-weighted sum of SGLang's uniform layers, {weighted:.1f} us"
            for kernels in KERNELS:
                bar = BAR if kernels == "ours" and tokens in TOKENS else None
                ratio = times[kernels, "mixed"] / weighted
                ok &= report(f"mixed layer, {kernels} kernels, {tokens} tokens", ratio, "x", baseline, bar)
    torch.distributed.destroy_process_group()
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
