"""All experts of a layer in one tensor: as GPT-OSS is on the hub, as transformers saves; shared out over EP ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang_mixed.checkpoint import open_checkpoint
from sglang_mixed.checkpoint.fused_experts import LAYOUTS

from .comparison import BOUND, REQUEST, largest_difference, random_prompts
from .conftest import Engine
from .families import EXPERT_WIDTH, EXPERTS, FAMILIES, HIDDEN, LAYERS, VOCABULARY
from .family_models import write_family
from .mixes import SOURCES, write_mix
from .reference import References
from .test_families import transformers_model

MIX = """\
mixed_precision:
  hub_path: hub
  gptq_path: gptq
  weight_mapping:
    "model.layers.*.mlp.experts.{1,3,6}.*": gptq
    "model.layers.*.mlp.experts.4.up_proj": gptq
"""


def write_hub(folder: Path) -> Path:
    """GPT-OSS as OpenAI published it: MXFP4 experts, all else BF16."""
    write_family(folder, "gpt_oss")
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(folder / "model.safetensors")
    shapes = {"gate_up_proj": (2 * EXPERT_WIDTH, HIDDEN), "down_proj": (HIDDEN, EXPERT_WIDTH)}
    for owner in {name.rpartition(".")[0] for name in tensors if name.endswith("gate_up_proj")}:
        for name, (out, columns) in shapes.items():
            del tensors[f"{owner}.{name}"]
            blocks = torch.randint(256, (EXPERTS, out, columns // 32, 16), generator=generator, dtype=torch.uint8)
            scales = torch.randint(121, 124, blocks.shape[:3], generator=generator, dtype=torch.uint8)
            tensors |= {f"{owner}.{name}_blocks": blocks, f"{owner}.{name}_scales": scales}
    save_file(tensors, folder / "model.safetensors")
    described = json.loads((folder / "config.json").read_text())
    left_out = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    described["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": left_out}
    (folder / "config.json").write_text(json.dumps(described))
    return folder


def test_mxfp4_experts_of_the_hub_run_beside_another_sources(tmp_path: Path, references: References) -> None:
    write_hub(tmp_path / "hub")
    write_family(tmp_path / "gptq", "gpt_oss", *SOURCES["gptq"])
    (tmp_path / "map.yaml").write_text(MIX)
    compared = references.compare(tmp_path / "map.yaml")
    assert compared.largest_difference <= BOUND
    assert compared.differing_tokens == []
    memory = compared.memory
    assert memory["by_format"]["MXFP4"]["modules"] == 2 * (3 * 5 - 1)
    assert memory["weight_bytes"] == memory["planned_bytes"]
    assert memory["verification"]["state"] == "verified"


def test_over_ep_ranks_it_computes_what_it_does_on_one(tmp_path: Path) -> None:
    described = write_mix(tmp_path, "gpt_oss", "everything differs")
    for config in tmp_path.glob("*/config.json"):
        config.write_text(json.dumps({**json.loads(config.read_text()), "torch_dtype": "float32"}))
    asked = {"input_ids": random_prompts(VOCABULARY), **REQUEST}
    mix = {"enable_mixed_precision": True, "mixed_precision_config": str(described), "skip_tokenizer_init": True}
    layouts = ({}, {"tp_size": 2, "ep_size": 2})
    engines = [
        Engine(tmp_path / f"log-{number}", tmp_path / "bf16", asked, dtype="float32", **mix, **layout)
        for number, layout in enumerate(layouts)
    ]
    whole, shared = (engine.result()["answers"][0] for engine in engines)
    assert largest_difference(shared, whole) <= 1e-4


@pytest.mark.parametrize("family", [name for name in FAMILIES if FAMILIES[name].model_type in LAYOUTS])
def test_every_expert_of_what_transformers_holds_and_saves_is_found(family: str, tmp_path: Path) -> None:
    tables = FAMILIES[family]
    apart = open_checkpoint(write_family(tmp_path / "apart", replace(tables, fused=False)))
    model = transformers_model(write_family(tmp_path / "hub", tables))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "saved", save_original_format=False)
    saved = open_checkpoint(tmp_path / "saved")
    assert not any(name.endswith(".experts") for name in saved.modules)
    found = {name: name.removeprefix(tables.prefix) for name in apart.modules if ".experts." in name}
    found = {name: there for name, there in found.items() if not there.startswith(f"model.layers.{LAYERS}.")}
    assert len(found) >= 3 * EXPERTS
    for name, there in found.items():
        expected = apart.read(name)
        for local, tensor in saved.read(there).items():
            assert torch.equal(tensor, expected[local]), (name, local)
