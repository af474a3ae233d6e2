"""The committed checkpoints of real tools: every module is recognised, counted to the byte, and near the original."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from packers import CODES
from safetensors.torch import load_file

from sglang_mixed.formats import Detector, TensorInfo, get_format, nbytes

TINY = Path(__file__).parents[2] / "examples" / "tiny"
#: Folder -> label of its quantized modules, greatest relative error of one against the original.
EXPECTED = {
    "bf16": ("BF16", 0.0),
    "fp8-block": ("FP8 128x128", 0.04),
    "fp8-channel": ("FP8 channel", 0.04),
    "gptq-int4": ("GPTQ int4 g128", 0.2),
    "int8": ("INT8 channel", 0.02),
}


def modules(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    found: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            module, _, local = name.rpartition(".")
            found[module][local] = tensor
    return found


@pytest.mark.parametrize("folder", EXPECTED)
def test_real_checkpoint(folder: str) -> None:
    label, bound = EXPECTED[folder]
    config = json.loads((TINY / folder / "config.json").read_text()).get("quantization_config")
    original, detector, quantized = modules(TINY / "bf16"), Detector(config), 0
    for module, tensors in modules(TINY / folder).items():
        infos = {local: TensorInfo(CODES[one.dtype], tuple(one.shape)) for local, one in tensors.items()}
        found = detector(module, infos)
        weights = get_format(found.name)
        decoded = weights.dequantize(tensors, found.parameters, torch.float32)
        expected = original[module]["weight"].to(torch.float32)
        assert weights.label(found.parameters) in ("BF16", label)
        assert nbytes(found) == sum(tensor.nbytes for tensor in tensors.values())
        assert (decoded - expected).norm() <= bound * expected.norm()
        quantized += found.name != "plain"
    assert quantized == (0 if folder == "bf16" else 56)
