"""Linears on a GPU: our Triton kernel ÷ SGLang's, GPTQ-Int4 q/k/v as one matrix and o, and BF16 routers.

    python benchmarks/gpu_linears.py

The widths are Qwen3-30B-A3B's and Qwen3-32B's; the router's are the former's. Layers run as they are served, replayed
from CUDA graphs in turns, more of them than the cache holds (but for routers, which are small); a copy stands ahead of
each, as other kernels do in a model, whose time is taken off. BF16 is PyTorch's. Prints one JSON object a measure, and
exits with 1 if ours is slower.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from gpu_experts import seconds  # noqa: E402
from measure import report  # noqa: E402
from synthetic import REAL_SIZES, write, write_map  # noqa: E402
from tests.engine.gpu_model import start_sglang  # noqa: E402
from tests.engine.layers import fill  # noqa: E402

from sglang_mixed import make_plan  # noqa: E402
from sglang_mixed.engine.layers.decoded import TRITON  # noqa: E402
from sglang_mixed.engine.layers.plain_linear import FEW_ROWS, PlainLinear  # noqa: E402
from sglang_mixed.engine.layers.split_linear import SplitLinear  # noqa: E402
from sglang_mixed.plan import RankPlan  # noqa: E402

ROWS, REPEATS, BAR = (1, 4, 8, 16, 32, 64, 128, 256, 1024, 4096), 9, 1.0
#: A model's sizes, and layers.
MODELS = {
    "Qwen3-30B-A3B": ({**REAL_SIZES, "num_experts": 8, "moe_intermediate_size": 128}, 16),
    "Qwen3-32B": (
        {
            "hidden_size": 5120,
            "moe_intermediate_size": 128,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "num_experts": 8,
            "num_experts_per_tok": 8,
        },
        4,
    ),
}
LAYERS = {"q/k/v": ("q_proj", "k_proj", "v_proj"), "o": ("o_proj",)}
KERNELS = {"Marlin": "needed", "ours": "faster"}
#: Outputs, columns and number of routers.
ROUTERS = 128, 2048, 48
Product = Callable[[torch.Tensor], torch.Tensor]


def product(plan: RankPlan, layer: int, names: tuple[str, ...]) -> Product:
    """A layer's, as it is served."""
    parts = [plan.plan.modules[f"model.layers.{layer}.self_attn.{name}"] for name in names]
    rows, columns = [part.format.shape[0] for part in parts], parts[0].format.shape[1]
    method, module = SplitLinear(parts), torch.nn.Module()

    def build() -> None:
        with torch.device("cuda"):
            method.create_weights(module, columns, rows, columns, sum(rows), torch.bfloat16)

    fill(plan, build)
    method.process_weights_after_loading(module)
    return lambda x: method.apply(module, x)


def routers(wish: str) -> list[Product]:
    """Those of a model's layers, as they are served."""
    os.environ[TRITON] = wish
    (outputs, columns, number), found = ROUTERS, []
    for _ in range(number):
        method, module = PlainLinear(), torch.nn.Module()
        with torch.device("cuda"):
            method.create_weights(module, columns, [outputs], columns, outputs, torch.bfloat16)
        module.weight.data.normal_()
        method.process_weights_after_loading(module)
        found.append(lambda x, method=method, module=module: method.apply(module, x))
    return found


def captured(run: list[Product], x: torch.Tensor, held: torch.Tensor) -> Callable[[], None]:
    """Replays one after another; `held` is what x is copied to ahead of each."""
    for one in run[:2]:
        one(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for one in run:
            held.copy_(x)
            one(x)
    return graph.replay


def microseconds(replays: dict[str, Callable[[], None]], number: int) -> dict[str, float]:
    """Of one product, without the copy."""
    found: dict[str, list[float]] = {key: [] for key in replays}
    for _ in range(REPEATS):
        for key, replay in replays.items():
            found[key].append(seconds(replay) * 1e6 / number)
    medians = {key: statistics.median(times[2:]) for key, times in found.items()}
    return {key: time - medians["copy"] for key, time in medians.items() if key != "copy"}


def compared(name: str, runs: dict[str, list[Product]], columns: int, row_counts: Sequence[int], baseline: str) -> bool:
    """Whether ours is no slower than the baseline at any number of rows."""
    ok, number = True, len(runs["ours"])
    runs = {**runs, "copy": [lambda x: x] * number}
    for rows in row_counts:
        x = torch.randn(rows, columns, device="cuda").bfloat16()
        held = torch.empty_like(x)
        times = microseconds({key: captured(run, x, held) for key, run in runs.items()}, number)
        told = {key: round(time, 2) for key, time in times.items()}
        print(json.dumps({"layer": name, "rows": rows, **told}), flush=True)
        ratio = times["ours"] / times[baseline]
        ok &= report(f"{name}, {rows} rows", ratio, "x", f"{baseline}, {times[baseline]:.1f} us", BAR)
    return ok


def main() -> int:
    from sglang.srt.server_args import ServerArgs

    torch.cuda.set_device(0)
    print(json.dumps({"device": torch.cuda.get_device_name()}), flush=True)
    ok = True
    with tempfile.TemporaryDirectory(dir="/dev/shm") as temporary, torch.no_grad():
        folder = Path(temporary)
        sources = {name: write(folder / name, "gptq", n, "cuda", **sizes) for name, (sizes, n) in MODELS.items()}
        arguments = {"attention_backend": "triton", "sampling_backend": "pytorch", "device": "cuda"}
        start_sglang(ServerArgs(model_path=str(sources["Qwen3-32B"]), **arguments), "nccl")
        for model, (_, number) in MODELS.items():
            plan = make_plan(write_map(folder / "map.yaml", {}, int4=sources[model])).rank()
            for kind, names in LAYERS.items():
                runs: dict[str, list[Product]] = {}
                for kernel, wish in KERNELS.items():
                    os.environ[TRITON] = wish
                    runs[kernel] = [product(plan, layer, names) for layer in range(number)]
                first = plan.plan.modules[f"model.layers.0.self_attn.{names[0]}"].format.shape
                shape = (runs["ours"][0](torch.zeros(1, first[1], device="cuda").bfloat16()).shape[1], first[1])
                weights = [torch.randn(shape, device="cuda").bfloat16() for _ in range(number)]
                runs["BF16"] = [lambda x, one=one: torch.nn.functional.linear(x, one) for one in weights]  # type: ignore[misc]
                ok &= compared(f"{kind} of {model}", runs, shape[1], ROWS, "Marlin")
        runs = {"cuBLAS": routers("needed"), "ours": routers("faster")}
        rows = [rows for rows in ROWS if rows <= FEW_ROWS]
        ok &= compared("router of Qwen3-30B-A3B", runs, ROUTERS[1], rows, "cuBLAS")
    torch.distributed.destroy_process_group()
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
