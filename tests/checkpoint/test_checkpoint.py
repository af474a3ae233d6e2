"""Reading a checkpoint: the same bytes as the safetensors library, formats, the reference decoding."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sglang_mixed.checkpoint import open_checkpoint
from sglang_mixed.errors import InconsistentFormatError, TensorMissingError, TruncatedFileError

from ..models import write

TINY = Path(__file__).parents[2] / "examples" / "tiny"
FOLDERS = ("bf16", "gptq-int4", "fp8-block", "fp8-channel", "int8")


@pytest.mark.parametrize("name", FOLDERS)
def test_the_bytes_are_those_that_the_safetensors_library_reads(name: str) -> None:
    checkpoint = open_checkpoint(TINY / name)
    expected = {key: tensor for file in checkpoint.files for key, tensor in load_file(file).items()}
    assert set(checkpoint.entries) == set(expected)
    found = {
        f"{module}.{local}": tensor
        for module in checkpoint.modules
        for local, tensor in checkpoint.read(module).items()
    }
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and found[key].shape == tensor.shape
        assert torch.equal(found[key].view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize("name", FOLDERS[1:])
def test_a_quantized_module_decodes_to_the_weight_it_came_from(name: str) -> None:
    base, checkpoint = open_checkpoint(TINY / "bf16"), open_checkpoint(TINY / name)
    module = "model.layers.1.mlp.experts.5.up_proj"
    assert checkpoint.format(module).name != "plain"
    expected, found = base.dequantize(module), checkpoint.dequantize(module)
    assert found.dtype == torch.float32 and found.shape == expected.shape
    assert (found - expected).norm() / expected.norm() < 0.2


def test_formats_of_equal_modules_are_shared(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "m", "gptq"))
    first, second = (f"model.layers.0.mlp.experts.{expert}.up_proj" for expert in (0, 3))
    assert checkpoint.format(first) is checkpoint.format(second)
    assert checkpoint.format(first).shape == (128, 64)


def test_entries_are_absolute_positions(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "m", shards=2))
    entry = checkpoint.entries["lm_head.weight"]
    raw = checkpoint.files[entry.file].read_bytes()[entry.begin : entry.end]
    assert raw == checkpoint.read_tensor("lm_head.weight").view(torch.uint8).numpy().tobytes()
    assert len(checkpoint.entries) == len(list(checkpoint.entries))


def test_a_missing_name_comes_with_the_nearest(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "m"))
    for call in (checkpoint.read_tensor, checkpoint.read, checkpoint.format, checkpoint.dequantize):
        with pytest.raises(TensorMissingError) as caught:
            call("model.layers.0.self_atn.q_proj")  # type: ignore[operator]
        assert caught.value.file == str(tmp_path / "m")
    assert "did you mean 'model.layers.0.self_attn.q_proj'" in str(caught.value)


def test_a_file_that_shrinks_after_it_was_opened_is_an_error_not_a_crash(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "m"))
    os.truncate(checkpoint.files[0], 4000)
    with pytest.raises(TruncatedFileError) as caught:
        checkpoint.read_tensor("model.norm.weight")
    assert caught.value.tensor == "model.norm.weight"


def test_the_config_and_the_tensors_must_agree(tmp_path: Path) -> None:
    said = {"quant_method": "gptq", "bits": 8, "group_size": 32, "desc_act": False, "sym": True}
    checkpoint = open_checkpoint(write(tmp_path / "m", "gptq", quantization_config=said))
    with pytest.raises(InconsistentFormatError):
        checkpoint.format("model.layers.0.self_attn.q_proj")


def test_the_digest_sees_headers_config_and_nothing_else(tmp_path: Path) -> None:
    one, same = open_checkpoint(write(tmp_path / "a")), open_checkpoint(write(tmp_path / "b", seed=1))
    other = open_checkpoint(write(tmp_path / "c", rope_theta=5.0))
    longer = open_checkpoint(write(tmp_path / "d", layers=3))
    assert one.digest == same.digest
    assert len({one.digest, other.digest, longer.digest}) == 3
