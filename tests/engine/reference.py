"""The reference of a mix: the same weights, dequantized to BF16 by the formats' exact references, as one checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from sglang_mixed.formats import get_format
from sglang_mixed.plan import Plan


def write_reference(plan: Plan, folder: Path) -> Path:
    """Write the plan's model in BF16 for stock SGLang; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    for module in plan.modules.values():
        stored = plan.checkpoints[module.source].read(module.name)
        if module.format.name == "plain":
            tensors |= {f"{module.name}.{local}": stored[local] for local in module.tensors}
            continue
        weight = get_format(module.format.name).dequantize(stored, module.format.parameters, torch.float32)
        tensors[f"{module.name}.weight"] = weight.to(torch.bfloat16)
        if "bias" in module.tensors:
            tensors[f"{module.name}.bias"] = stored["bias"]
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    base = plan.sources[plan.base]
    config = json.loads((base / "config.json").read_text())
    config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (base / name).exists():
            shutil.copy(base / name, folder / name)
    return folder
