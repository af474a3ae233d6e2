"""Output tokens per second on the CPU: a uniform BF16 map ÷ stock SGLang on the same checkpoint, requests in turn."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from measure import report
from synthetic import write, write_map

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.engine.conftest import Server

TOKENS = 16


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=6)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = write(folder / "bf16", "bf16", 2)
        described = write_map(folder / "map.yaml", {}, bf16=model)
        flags = ("--model-path", model, "--skip-tokenizer-init", "--disable-radix-cache", "--sleep-on-idle")
        mixed = ("--enable-mixed-precision", "--mixed-precision-config", described)
        servers = {
            "stock": Server(folder / "stock.log", *flags),
            "mixed": Server(folder / "mixed.log", *flags, *mixed),
        }
        try:
            for server in servers.values():
                server.wait()
            ok = [compare(servers, batch, repeats) for batch in (1, 8)]
        finally:
            for server in servers.values():
                server.stop()
    return 0 if all(ok) else 1


def compare(servers: dict[str, Server], batch: int, repeats: int) -> bool:
    """The ratio of the best times: what else the machine does can only slow a run down."""
    prompts = [[2 + index, 5, 7, 11] for index in range(batch)]
    sampling = {"max_new_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    seconds: dict[str, list[float]] = {name: [] for name in servers}
    for repeat in range(repeats + 1):
        for name, server in servers.items():
            started = time.perf_counter()
            server.generate(prompts, sampling_params=sampling)
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    rates = {name: batch * TOKENS / min(times) for name, times in seconds.items()}
    baseline = f"stock SGLang, {rates['stock']:.1f} tokens/s"
    ratio = rates["mixed"] / rates["stock"]
    return report(f"uniform BF16 map, batch {batch}", ratio, "x", baseline, 0.98, at_least=True)


if __name__ == "__main__":
    sys.exit(main())
