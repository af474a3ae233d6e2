"""On a GPU: how long a load takes, what it holds and what it needs meanwhile, against SGLang's own loader.

    python scripts/gpu/loading.py [--layers 4] [--experts 128] [--repeats 3] [--kinds bf16 fp8 gptq mix] [--folder DIR]

Checkpoints have the widths of Qwen3-30B-A3B and a file a layer, and are in the page cache. Both loaders run in this
process, in turn; the first round is not counted, and the last one's loads are verified by the files' hashes. Bars: no
slower than SGLang on the same files (the mix: than the parts of SGLang's loads of its sources that it takes, by their
bytes), the planned bytes held, at most a layer's bytes of temporary memory. One JSON object a measure.

`--device cpu --layers 2 --experts 4` proves this script: kernels are stand-ins, SGLang loads BF16 only.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from measure import report  # noqa: E402
from synthetic import REAL_WIDTHS, write, write_map  # noqa: E402
from tests.engine.gpu_model import replace_gpu, start_sglang  # noqa: E402

from sglang_mixed import make_plan  # noqa: E402

KINDS = ("bf16", "fp8", "gptq")
#: The mix: of every layer's experts the first half in FP8, the other half in Int4.
MIX = {"model.layers.*.mlp.experts.{{0..{half}}}.*": "fp8", "model.layers.*.mlp.experts.{{{rest}..{last}}}.*": "gptq"}


@dataclass(frozen=True)
class Outcome:
    """Of one load: seconds, and bytes on the GPU; what the proof reports of a load of ours."""

    seconds: float
    held: int = 0
    temporary: int = 0
    proof: dict[str, Any] = field(default_factory=dict)


class Loads:
    """Loads in this process, each from a fresh start of the allocator's books."""

    def __init__(self, device: str) -> None:
        from sglang.srt.plugins import load_plugins

        # DeepGEMM would compile for minutes; nothing is multiplied here.
        os.environ.setdefault("SGLANG_ENABLE_JIT_DEEPGEMM", "0")
        load_plugins()
        self._device, self._is_gpu = device, device == "cuda"
        if self._is_gpu:
            _leave_out_products()
        else:
            replace_gpu()

    def load(self, model: Path, described: Path | None, verifies: bool) -> Outcome:
        """A map over the model by our loader, and whether the files are read again; or the model itself by SGLang's."""
        from sglang.srt.configs.device_config import DeviceConfig
        from sglang.srt.configs.load_config import LoadConfig
        from sglang.srt.entrypoints.engine import Engine
        from sglang.srt.model_loader import loader

        from sglang_mixed.engine import state
        from sglang_mixed.engine.loading.proof import Proof

        mixed = {"enable_mixed_precision": True, "mixed_precision_config": str(described)} if described else {}
        arguments: Any = Engine.server_args_class(model_path=str(model), dtype="bfloat16", log_level="error", **mixed)
        config = start_sglang(arguments, "nccl" if self._is_gpu else "gloo")
        load_config = LoadConfig(model_loader_extra_config=arguments.model_loader_extra_config)
        chosen = loader.get_model_loader(load_config, config)
        self._clear()
        before, started = self._allocated(), time.perf_counter()
        with patch.object(Proof, "_verify", Proof._verify if verifies else _nothing):
            loaded = chosen.load_model(model_config=config, device_config=DeviceConfig(self._device))
            if self._is_gpu:
                torch.cuda.synchronize()
            seconds, held = time.perf_counter() - started, self._allocated() - before
            peak = torch.cuda.max_memory_allocated() - before if self._is_gpu else 0
            proof = _wait_for_proof(state) if described else {}
        state.proof = None
        del loaded, chosen
        return Outcome(seconds, held, max(0, peak - held), proof)

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated() if self._is_gpu else 0

    def _clear(self) -> None:
        gc.collect()
        if self._is_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def _nothing(proof: Any) -> Iterator[None]:
    return iter(())


def _leave_out_products() -> None:
    """Nothing is multiplied here: only what repacks is compiled."""
    from sglang_mixed.engine.loading import kernel_builds, loader

    loader.KernelBuilds = lambda kernels, speaks: kernel_builds.KernelBuilds(  # type: ignore[assignment, misc]
        [kernel for kernel in kernels if "repack" in kernel.module], speaks
    )


def _wait_for_proof(state: Any) -> dict[str, Any]:
    while (found := state.proof.report(modules=False))["verification"]["state"] == "running":
        time.sleep(0.05)
    assert found["verification"]["state"] == "verified", found["verification"]
    proof: dict[str, Any] = found
    return proof


def sides(folder: Path, kinds: list[str], layers: int, experts: int, is_gpu: bool) -> Iterator[tuple[str, Any]]:
    """Name -> model and map, the checkpoints written when they are asked for."""
    drawn_on, sizes = "cuda" if is_gpu else "cpu", {"num_experts": experts, "vocab_size": 16384, **REAL_WIDTHS}
    sources = {
        kind: write(folder / kind, kind, layers, drawn_on, sharded=True, **sizes)
        for kind in KINDS
        if kind in kinds or kind == "bf16" or "mix" in kinds
    }
    for kind in dict.fromkeys(("bf16", *kinds)):
        if kind == "mix":
            numbers = {"half": experts // 2 - 1, "rest": experts // 2, "last": experts - 1}
            rules = {pattern.format(**numbers): source for pattern, source in MIX.items()}
            yield "mix", (sources["bf16"], write_map(folder / "mix.yaml", rules, **sources))
            continue
        if is_gpu or kind == "bf16":
            yield f"stock {kind}", (sources[kind], None)
        yield kind, (sources[kind], write_map(folder / f"{kind}.yaml", {}, **{kind: sources[kind]}))


def take_turns(
    loads: Loads, described: dict[str, Any], repeats: int
) -> tuple[dict[str, list[Outcome]], dict[str, str]]:
    """What each side's loads gave after the first, and why a side that could not load gave nothing."""
    outcomes, failed = {name: list[Outcome]() for name in described}, dict[str, str]()
    for repeat in range(repeats + 1):
        for name in list(outcomes):
            try:
                outcome = loads.load(*described[name], verifies=repeat == repeats)
                print(json.dumps({"load": name, "seconds": round(outcome.seconds, 3)}), flush=True)
                outcomes[name] += [outcome] if repeat else []
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {error}"
                del outcomes[name]
    return outcomes, failed


def stock_seconds(described: Path, outcomes: dict[str, list[Outcome]]) -> float | None:
    """What SGLang's loader takes for the same files: of each source the share that the map takes, by its bytes."""
    taken, nbytes = make_plan(described).rank(), Counter[str]()
    for module in taken.parts:
        nbytes[taken.plan.modules[module].source] += taken.module_bytes(module)
    if any(f"stock {source}" not in outcomes or source not in outcomes for source in nbytes):
        return None
    return sum(
        size / outcomes[source][-1].proof["planned_bytes"] * min(one.seconds for one in outcomes[f"stock {source}"])
        for source, size in nbytes.items()
    )


def measure(name: str, described: Path, outcomes: dict[str, list[Outcome]], layers: int) -> list[bool]:
    """One side of ours against SGLang's loader; whether it is within each bar."""
    ours, stock = outcomes[name], outcomes.get(f"stock {name}")
    seconds, last = min(one.seconds for one in ours), ours[-1]
    planned = last.proof["planned_bytes"]
    checks = [report(f"{name}: bytes held / planned", last.proof["weight_bytes"] / planned, "x", "plan", 1.0)]
    if theirs := stock_seconds(described, outcomes):
        what = f"{name}: load time, {planned / 2**30 / seconds:.2f} GiB/s"
        checks.append(report(what, seconds / theirs, "x", f"stock SGLang, {theirs:.3f} s", 1.0))
    if last.held:
        padding = last.proof["padding_bytes"]
        checks.append(
            report(f"{name}: GPU memory / planned and padding", last.held / (planned + padding), "x", "", 1.02)
        )
        checks.append(
            report(
                f"{name}: temporary GPU memory / a layer",
                max(one.temporary for one in ours) / (planned / layers),
                "x",
                "plan",
                1.0,
            )
        )
    if stock and stock[-1].held:
        report(f"stock {name}: temporary GPU memory", stock[-1].temporary / 2**20, "MiB", "", None)
    return checks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", default=[*KINDS, "mix"], choices=[*KINDS, "mix"])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--folder", type=Path, help="Where the checkpoints are written; as a rule a temporary one.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        described = dict(
            sides(Path(temporary), options.kinds, options.layers, options.experts, options.device == "cuda")
        )
        outcomes, failed = take_turns(Loads(options.device), described, options.repeats)
        checks = [
            measure(name, described[name][1], outcomes, options.layers) for name in outcomes if described[name][1]
        ]
    for name, error in failed.items():
        print(json.dumps({"measure": name, "error": error}), flush=True)
    return 0 if all(map(all, checks)) and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
