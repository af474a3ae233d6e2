"""The main job: one model from three checkpoints, planned, served by SGLang over HTTP, proven, and measured.

Prints the plan, the answer to a chat request, predicted and measured bytes, the proof, and the perplexity of BF16,
of the mix and of all-Int4 on held-out text; the last line is the same as JSON.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from perplexity import REQUEST, perplexity, windows

TINY = Path(__file__).parent / "tiny"
MAP = TINY / "map.yaml"
QUESTION = "def read_lines(path):"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def http(url: str, body: dict[str, Any] | None = None) -> Any:
    request = urllib.request.Request(
        url, None if body is None else json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.loads(response.read() or "null")


@contextmanager
def server(port: int, log: IO[bytes]) -> Any:
    """`sglang serve` with the map; yields its URL once it answers."""
    command = f"""serve --model-path {TINY / "bf16"} --enable-mixed-precision --mixed-precision-config {MAP}
                  --port {port} --mem-fraction-static 0.2 --max-total-tokens 16384"""
    print("$ sglang", *command.split(), flush=True)
    process = subprocess.Popen([Path(sys.executable).parent / "sglang", *command.split()], stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        while True:
            try:
                http(f"{url}/model_info")
                break
            except OSError:
                if process.poll() is not None:
                    raise SystemExit(f"the server ended; its log:\n{Path(log.name).read_text()}") from None
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def start_baselines(log: IO[bytes]) -> subprocess.Popen[bytes]:
    """Perplexity of BF16 on stock SGLang and of all-Int4, in a second process while the server starts."""
    command = [sys.executable, Path(__file__).parent / "baselines.py"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)


def finish_baselines(process: subprocess.Popen[bytes], log: IO[bytes]) -> dict[str, float]:
    output = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"the baselines ended; their log:\n{Path(log.name).read_text()}")
    perplexities: dict[str, float] = json.loads(output.splitlines()[-1])
    return perplexities


def chat(url: str, question: str) -> str:
    messages = [{"role": "user", "content": question}]
    body = {"model": "tiny", "messages": messages, "max_tokens": 48, "temperature": 0}
    return str(http(f"{url}/v1/chat/completions", body)["choices"][0]["message"]["content"])


def wait_for_proof(url: str) -> dict[str, Any]:
    while True:
        report: dict[str, Any] = http(f"{url}/mixed_precision")
        if report["verification"]["state"] != "running":
            return report
        time.sleep(0.2)


def main() -> None:
    program = Path(sys.executable).parent / "sglang-mixed"
    subprocess.run([program, "check", MAP], check=True)
    log, other_log = (tempfile.NamedTemporaryFile(suffix=".log") for _ in range(2))  # noqa: SIM115
    others = start_baselines(other_log)
    with server(free_port(), log) as url:
        answer = chat(url, QUESTION)
        report = wait_for_proof(url)
        prompts = windows(TINY / "bf16", TINY / "heldout.txt")
        mix = perplexity(prompts, lambda ids: http(f"{url}/generate", {"input_ids": ids, **REQUEST}))
        subprocess.run([program, "proof", url], check=True)
    perplexities = {"mix": mix, **finish_baselines(others, other_log)}
    print(f"\n> {QUESTION}\n{answer}\n")
    print("perplexity on held-out text: " + ", ".join(f"{name} {value:.2f}" for name, value in perplexities.items()))
    keys = ("planned_bytes", "weight_bytes", "bf16_bytes")
    result = {key: report[key] for key in keys} | {
        "modules": report["verification"]["modules"],
        "verified_modules": report["verification"]["verified"],
        "answer": answer,
        "perplexity": perplexities,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
