"""Output tokens per second on a GPU: maps ÷ stock SGLang, and a mix ÷ BF16 and ÷ all-Int4, CUDA graphs on.

    python benchmarks/gpu_serving.py [--layers 4] [--repeats 9] [--instances 1] [--in-turns] [--only NAME ...]

Random weights of Qwen3-30B-A3B's shapes; the whole model has 48 layers. All engines start at once, then answer in
turns, each in a process of its own; with two GPUs those whose base is in BF16 have one to themselves. Where the host
decides, equal engines differ by more than the bars allow: of several instances the fastest counts. Prints one JSON
object a measure, and exits with 1 if a bar is missed. Prompts run from CUDA graphs as well, which is SGLang's default,
captured for those of this benchmark only. Told besides: the rate after the first token.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from measure import report  # noqa: E402
from synthetic import REAL_SIZES, write, write_map  # noqa: E402
from tests.engine.layers import PREFIX  # noqa: E402

BATCHES, NEW_TOKENS, PROMPT, VOCABULARY = (1, 16, 64), 128, 16, 151_936
HOT_EXPERTS = f"{PREFIX.replace('.0.', '.*.')}.{{0..31}}.*"
ENGINE: dict[str, Any] = {
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "cuda_graph_bs_prefill": [batch * PROMPT for batch in BATCHES],
    "cuda_graph_bs_decode": BATCHES,
    "disable_radix_cache": True,
    "skip_tokenizer_init": True,
    "max_total_tokens": 32768,
    "mem_fraction_static": 0.9,
    "log_level": "error",
}
#: name -> the checkpoint of stock SGLang; or a map's base, its rules, and what our kernels run (SGLANG_MIXED_TRITON).
STOCK = {"stock BF16": "bf16", "stock FP8": "fp8"}
MAPS: dict[str, tuple[str, dict[str, str], str | None]] = {
    "BF16 map": ("bf16", {}, "faster"),
    "FP8 map": ("fp8", {}, "faster"),
    "Int4 map": ("int4", {}, "needed"),
    "Int4 map, our kernels": ("int4", {}, "faster"),
    "hot FP8 experts": ("int4", {HOT_EXPERTS: "fp8"}, "faster"),
}
ENGINES = {name: (base, dict[str, str](), None) for name, base in STOCK.items()} | MAPS
#: measure, numerator, denominator, bar, at which batches.
RATIOS = [
    ("uniform BF16 map", "BF16 map", "stock BF16", 0.98, BATCHES),
    ("uniform FP8 map", "FP8 map", "stock FP8", 0.98, BATCHES),
    ("Int4 on our kernels", "Int4 map, our kernels", "Int4 map", 0.98, BATCHES),
    ("25 % FP8 + 75 % Int4 experts", "hot FP8 experts", "Int4 map", 0.95, BATCHES),
    ("25 % FP8 + 75 % Int4 experts", "hot FP8 experts", "stock BF16", 1.5, (1, 16)),
]


class Answering:
    """An engine in a process of its own, which answers batches when it is asked to."""

    def __init__(self, log: Path, arguments: Mapping[str, Any], gpu: str, wish: str | None, cores: set[int]) -> None:
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpu}
        environment |= {"SGLANG_MIXED_TRITON": wish} if wish else {}
        self._cores = cores
        self._log, self._errors = log, log.open("w")
        command = [sys.executable, __file__, "--engine", json.dumps({**ENGINE, **arguments})]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        self._process = subprocess.Popen(command, env=environment, text=True, start_new_session=True, **pipes)

    def wait(self) -> None:
        """Until it serves. Raises RuntimeError with the log's end if it never will."""
        self._line()

    def keep_to_its_cores(self) -> None:
        """From now on; each thread of each of its processes."""
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if os.getsid(int(process.name)) == self._process.pid:
                    for thread in (process / "task").iterdir():
                        os.sched_setaffinity(int(thread.name), self._cores)

    def seconds(self, batch: int, new_tokens: int = NEW_TOKENS) -> float:
        """How long one batch takes it."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{batch} {new_tokens}\n")
        self._process.stdin.flush()
        return float(self._line())

    def stop(self) -> None:
        """It and all that it started."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, 9)

    def _line(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("= "):
                return line[2:]
        raise RuntimeError(self._log.read_text()[-3000:])


def answer(arguments: dict[str, Any]) -> None:
    """What an engine's process does."""
    import sglang

    from sglang_mixed import get_mixed_precision_memory_stats

    engine = sglang.Engine(**arguments)
    # The proof reads the files once more, on the cores that schedule.
    while arguments.get("enable_mixed_precision") and "running" in str(get_mixed_precision_memory_stats()):
        time.sleep(0.5)
    print("= ready", flush=True)
    for line in sys.stdin:
        batch, new_tokens = map(int, line.split())
        prompts = [[2 + (31 * row + 7 * place) % 8000 for place in range(PROMPT)] for row in range(batch)]
        sampling = {"max_new_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
        started = time.perf_counter()
        engine.generate(input_ids=prompts, sampling_params=sampling)
        print("=", time.perf_counter() - started, flush=True)


#: An engine's name, and which of its instances.
Key = tuple[str, int]


def started(folder: Path, layers: int, groups: list[list[str]], instances: int) -> dict[Key, Answering]:
    """Every engine that answers, once all have started; files are kept only until the last group that needs them."""
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    keys = [(name, instance) for names in groups for name in names for instance in range(instances)]
    cores = dict(zip(keys, shares_of_cores(len(keys)), strict=True))
    found: dict[Key, Answering] = {}
    began = time.monotonic()
    for number, names in enumerate(groups):
        sources = written(folder, layers, {kind for name in names for kind in kinds_of(name)})
        group = [key for key in keys if key[0] in names]
        for name, instance in group:
            base, rules, wish = ENGINES[name]
            arguments: dict[str, Any] = {"model_path": str(sources[base])}
            if name in MAPS:
                path = write_map(folder / f"{name}.yaml", rules, **{kind: sources[kind] for kind in kinds_of(name)})
                arguments |= {"enable_mixed_precision": True, "mixed_precision_config": str(path)}
            log = folder / f"{name} {instance}.log"
            key = name, instance
            found[key] = Answering(log, arguments, gpus[base != "bf16" and -1], wish, cores[key])
        for key in group:
            try:
                found[key].wait()
                print(json.dumps({"engine": key[0], "ready_seconds": round(time.monotonic() - began)}), flush=True)
            except RuntimeError as error:
                print(json.dumps({"engine": key[0], "error": str(error)}), flush=True)
                del found[key]
        later = {kind for names in groups[number + 1 :] for name in names for kind in kinds_of(name)}
        for kind in sources.keys() - later:
            shutil.rmtree(sources[kind])
    for engine in found.values():
        engine.keep_to_its_cores()
    return found


def kinds_of(name: str) -> list[str]:
    """The checkpoints that an engine reads."""
    base, rules, _ = ENGINES[name]
    return list(dict.fromkeys([base, *rules.values()]))


def written(folder: Path, layers: int, kinds: set[str]) -> dict[str, Path]:
    """The checkpoints of these kinds, unless they are there."""

    def one(kind: str) -> Path:
        if (folder / kind).exists():
            return folder / kind
        stored = {"int4": "gptq"}.get(kind, kind)
        return write(folder / kind, stored, layers, "cuda", sharded=True, vocab_size=VOCABULARY, **REAL_SIZES)

    with ThreadPoolExecutor() as pool:
        found = dict(zip(kinds, pool.map(one, kinds), strict=True))
    torch.cuda.empty_cache()
    return found


def shares_of_cores(number: int) -> list[set[int]]:
    """This process's cores in so many equal shares, none of which two have a half of.

    Schedulers that wait never sleep: two on the halves of one core would both be slow, by chance.
    """
    halves: dict[str, set[int]] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        halves.setdefault(siblings.read_text() if siblings.exists() else str(cpu), set()).add(cpu)
    cores, each = list(halves.values()), max(1, len(halves) // number)
    return [
        set().union(*(cores[(share * each + core) % len(cores)] for core in range(each))) for share in range(number)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--instances", type=int, default=1, help="Of each engine.")
    parser.add_argument("--only", nargs="*", default=[*ENGINES], help="Names of engines.")
    parser.add_argument("--in-turns", action="store_true", help="Start by base: memory for one base's files is enough.")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine:
        answer(json.loads(arguments.engine))
        return 0
    os.environ.setdefault("SGLANG_ENABLE_JIT_DEEPGEMM", "0")  # it would compile for minutes
    with tempfile.TemporaryDirectory(dir="/dev/shm") as temporary:
        bases = {name: ENGINES[name][0] for name in arguments.only}
        groups = [[name for name in bases if bases[name] == base] for base in dict.fromkeys(bases.values())]
        groups = groups if arguments.in_turns else [list(bases)]
        engines = started(Path(temporary), arguments.layers, groups, arguments.instances)
        try:
            good = [measured(engines, batch, arguments.repeats) for batch in BATCHES]
        finally:
            for engine in engines.values():
                engine.stop()
    return 0 if all(good) else 1


def measured(engines: dict[Key, Answering], batch: int, repeats: int) -> bool:
    """Rates and ratios of one batch; the engines take turns."""
    seconds: dict[Key, list[tuple[float, float]]] = {key: [] for key in engines}
    for _ in range(repeats + 1):
        for key, engine in engines.items():
            seconds[key].append((engine.seconds(batch), engine.seconds(batch, 1)))
    rates: dict[str, float] = {}
    decoding: dict[str, float] = {}
    for (name, _), times in seconds.items():
        whole, first = (statistics.median(side) for side in zip(*times[1:], strict=True))
        rates[name] = max(rates.get(name, 0), batch * NEW_TOKENS / whole)
        decoding[name] = max(decoding.get(name, 0), batch * (NEW_TOKENS - 1) / (whole - first))
    for name, rate in rates.items():
        line = {"engine": name, "batch": batch, "output_tokens_per_second": round(rate)}
        print(json.dumps({**line, "after_the_first": round(decoding[name])}), flush=True)
    ok = True
    for measure, one, other, bar, batches in RATIOS:
        if batch in batches and {one, other} <= rates.keys():
            for which, side, limit in (("", rates, bar), (", after the first token", decoding, None)):
                what, baseline = f"{measure}, batch {batch}{which}", f"{other}, {side[other]:.0f} tokens/s"
                ok &= report(what, side[one] / side[other], "x", baseline, limit, at_least=True)
    return ok


if __name__ == "__main__":
    sys.exit(main())
