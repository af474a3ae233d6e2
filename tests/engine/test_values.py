"""A broken value, or a file that is written meanwhile, ends the load with a message that names it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang_mixed.engine.arguments import Request, translate
from sglang_mixed.errors import ChangedFileError, EngineError

from .conftest import TINY, Engine

Tensors = dict[str, torch.Tensor]
SCALE, HEAD = "model.layers.0.self_attn.q_proj.weight_scale", "lm_head.weight"


def mix(folder: Path, source: str = "", change: Callable[[Tensors], object] = len) -> Path:
    """A copy of the tiny checkpoints with a map over them, one file changed."""
    for name in ("bf16", "fp8-channel"):
        shutil.copytree(TINY / name, folder / name)
    if source:
        file = folder / source / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
    described = folder / "map.yaml"
    described.write_text(
        "mixed_precision:\n  bf16_path: bf16\n  fp8_path: fp8-channel\n"
        '  weight_mapping: {"model.layers.*.self_attn.*_proj": fp8}\n'
    )
    return described


def poison(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name].view(-1)[3] = float("nan")

    return change


def start(described: Path, **flags: bool) -> Engine:
    arguments = {"enable_mixed_precision": True, "mixed_precision_config": str(described), **flags}
    return Engine(described.with_suffix(".log"), described.parent / "bf16", skip_tokenizer_init=True, **arguments)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Engine]:
    """Both at once: each spends its time starting."""
    folder = tmp_path_factory.mktemp("broken")
    return {
        "scale": start(mix(folder / "scale", "fp8-channel", poison(SCALE))),
        "weight": start(mix(folder / "weight", "bf16", poison(HEAD)), verify_values=True),
    }


def test_a_scale_that_is_no_number_ends_any_load(broken: dict[str, Engine]) -> None:
    assert broken["scale"].job.wait(300) != 0
    text = broken["scale"].log.read_text()
    assert SCALE in text and "nan" in text and "fp8-channel/model.safetensors" in text


def test_a_weight_that_is_no_number_ends_a_load_that_verifies_values(broken: dict[str, Engine]) -> None:
    assert broken["weight"].job.wait(300) != 0
    text = broken["weight"].log.read_text()
    assert HEAD in text and "finite numbers" in text


def request(described: Path) -> Request:
    arguments = {
        "enable_mixed_precision": True,
        "mixed_precision_config": str(described),
        "model_path": str(described.parent / "bf16"),
    }
    overrides = translate(arguments, set(arguments))
    return Request(**json.loads(overrides["model_loader_extra_config"])["mixed_precision"])


def test_a_file_that_is_written_between_the_check_and_the_load_is_named(tmp_path: Path) -> None:
    described = mix(tmp_path)
    checked = request(described)
    checked.rebuild_plan()
    file = tmp_path / "fp8-channel" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.q_proj.weight"].view(torch.uint8)[0, 0] ^= 1
    save_file(tensors, file)
    with pytest.raises(ChangedFileError) as caught:
        checked.rebuild_plan()
    assert caught.value.file == str(file)


def test_a_header_that_changes_between_the_check_and_the_load_is_noticed(tmp_path: Path) -> None:
    described = mix(tmp_path)
    checked = request(described)
    file = tmp_path / "fp8-channel" / "model.safetensors"
    times = file.stat()
    save_file(load_file(file), file, metadata={"format": "pt", "note": "x"})
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(EngineError):
        checked.rebuild_plan()


def test_a_file_that_is_written_during_the_load_is_noticed(tmp_path: Path) -> None:
    plan = request(mix(tmp_path)).rebuild_plan()
    plan.require_unchanged()
    file = tmp_path / "bf16" / "model.safetensors"
    os.utime(file)
    with pytest.raises(ChangedFileError) as caught:
        plan.require_unchanged()
    assert caught.value.file == str(file)
