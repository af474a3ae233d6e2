"""Bad input ends the real server before it serves: one message of ours, status not 0."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from .conftest import FLAGS, TINY, Server

MIX = ("--enable-mixed-precision", "--mixed-precision-config")


def start(*arguments: str | Path, program: tuple[str, ...]) -> subprocess.Popen[str]:
    command = [*program, *map(str, arguments), *FLAGS]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def tied_without_head(folder: Path) -> Path:
    """Qwen3-MoE whose config says tied embeddings: SGLang's model ignores that and leaves its lm_head unfilled."""
    shutil.copytree(TINY / "bf16", folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    return folder


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Both at once: each spends its time importing SGLang."""
    folder = tmp_path_factory.mktemp("refusals")
    serve = (str(Path(sys.executable).parent / "sglang"), "serve")
    launch = (sys.executable, "-m", "sglang.launch_server")
    misspelt = folder / "misspelt.yaml"
    misspelt.write_text(f"mixed_precision:\n  fp16_path: {TINY / 'bf16'}\n  weight_maping: {{}}\n")
    running = {
        "missing map": start("--model-path", TINY / "bf16", *MIX, folder / "no.yaml", program=serve),
        "unknown key": start("--model-path", TINY / "bf16", *MIX, misspelt, program=launch),
    }
    return {name: (process.wait(300), process.communicate()[0]) for name, process in running.items()}


def test_a_missing_map_is_one_message(outcomes: dict[str, tuple[int, str]]) -> None:
    status, output = outcomes["missing map"]
    assert status == 1
    assert "no.yaml" in output and "Traceback" not in output


def test_an_unknown_key_names_the_nearest_and_its_line(outcomes: dict[str, tuple[int, str]]) -> None:
    status, output = outcomes["unknown key"]
    assert status == 1
    assert "did you mean 'weight_mapping'" in output and "misspelt.yaml:3" in output and "Traceback" not in output


def test_a_weight_that_nothing_fills_ends_the_server(tmp_path: Path) -> None:
    model, described = tied_without_head(tmp_path / "tied"), tmp_path / "tied.yaml"
    described.write_text(f"mixed_precision:\n  fp16_path: {model}\n")
    server = Server(tmp_path / "log", "--model-path", model, *MIX, described, fresh=False)
    try:
        assert server.job.wait(300) != 0
    finally:
        server.job.kill()
    assert "missing: lm_head.weight" in server.log.read_text()
