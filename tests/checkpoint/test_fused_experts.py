"""Experts that a checkpoint holds in one tensor a layer: every expert's own, exact, each byte read once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sglang_mixed.checkpoint import Checkpoint, Read, open_checkpoint
from sglang_mixed.checkpoint.fused_experts import LAYOUTS, Layout
from sglang_mixed.errors import InconsistentFormatError
from sglang_mixed.stream import FileRead, ReadLog, stream

EXPERTS, HIDDEN, WIDTH = 3, 64, 32
OWNER = "model.layers.0.mlp.experts"
SIZES = {"gate_proj": (WIDTH, HIDDEN), "up_proj": (WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}
Tensors = dict[str, torch.Tensor]


def separate(dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """Every expert's weights and biases."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for expert in range(EXPERTS):
        for name, (out, columns) in SIZES.items():
            found[f"{expert}.{name}.weight"] = torch.randn(out, columns, generator=generator).to(dtype)
            found[f"{expert}.{name}.bias"] = torch.randn(out, generator=generator).to(dtype)
    return found


def fuse(tensors: Tensors, layout: Layout, with_bias: bool) -> Tensors:
    """The layer's fused tensors, by their local name below `….experts`."""
    found: dict[str, list[torch.Tensor]] = {}
    for expert in range(EXPERTS):
        for local in ("weight", "bias") if with_bias else ("weight",):
            gate, up, down = (tensors[f"{expert}.{name}.{local}"] for name in SIZES)
            both = torch.stack([gate, up], 1).flatten(0, 1) if layout.interleaved else torch.cat([gate, up])
            for name, tensor in (("gate_up_proj", both), ("down_proj", down)):
                matrix = tensor.T if layout.transposed and local == "weight" else tensor
                found.setdefault(name + ("" if local == "weight" else "_bias"), []).append(matrix)
    return {name: torch.stack(parts) for name, parts in found.items()}


def write(folder: Path, model_type: str, fused: Tensors, **changes: Any) -> Path:
    layout = LAYOUTS[model_type]
    described = {"num_local_experts": EXPERTS, "hidden_size": HIDDEN, layout.width: WIDTH, "model_type": model_type}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**described, **changes}))
    named = {f"{OWNER}.{local}": tensor.contiguous() for local, tensor in fused.items()}
    save_file({"model.norm.weight": torch.ones(HIDDEN), **named}, folder / "model.safetensors")
    return folder


def reads(checkpoint: Checkpoint, *names: str) -> Iterator[FileRead]:
    """What is read of these tensors (of all)."""
    (shard,) = checkpoint.shards
    wanted = [
        (place, name) for place, name in zip(shard.places, shard.names, strict=True) if not names or name in names
    ]
    yield "source", shard.path, [Read(name, shard.entry(0, place)) for place, name in wanted]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("model_type", LAYOUTS)
def test_every_expert_has_its_own_tensors_exactly(model_type: str, with_bias: bool, tmp_path: Path) -> None:
    expected = {name: tensor for name, tensor in separate().items() if with_bias or name.endswith("weight")}
    checkpoint = open_checkpoint(write(tmp_path / "m", model_type, fuse(expected, LAYOUTS[model_type], with_bias)))
    assert set(checkpoint.modules) == {"model.norm", *(f"{OWNER}.{name.rpartition('.')[0]}" for name in expected)}
    log = ReadLog()
    found = dict(stream(reads(checkpoint), log))
    for name, tensor in expected.items():
        assert torch.equal(found[f"{OWNER}.{name}"], tensor)
        assert torch.equal(checkpoint.read_tensor(f"{OWNER}.{name}"), tensor)
        assert found[f"{OWNER}.{name}"].is_contiguous()
    assert log.bytes_read == HIDDEN * 4 + sum(tensor.nbytes for tensor in expected.values())
    module = checkpoint.format(f"{OWNER}.1.up_proj")
    assert (module.name, module.shape) == ("plain", (WIDTH, HIDDEN))
    assert checkpoint.format(f"{OWNER}.1.gate_proj") is checkpoint.format(f"{OWNER}.2.up_proj")
    assert torch.equal(checkpoint.dequantize(f"{OWNER}.2.down_proj"), expected["2.down_proj.weight"].float())


@pytest.mark.parametrize("model_type", ["gpt_oss", "llama4_text", "qwen3_moe"])
def test_a_part_of_an_expert_is_cut_before_it_is_read(model_type: str, tmp_path: Path) -> None:
    expected = separate()
    checkpoint = open_checkpoint(write(tmp_path / "m", model_type, fuse(expected, LAYOUTS[model_type], False)))
    regions = {"gate_proj": ((8, 16), (0, 64)), "up_proj": ((8, 16), (0, 64)), "down_proj": ((0, 64), (8, 16))}
    planned = [
        Read(f"{OWNER}.1.{name}.weight", checkpoint.locate(f"{OWNER}.1.{name}", "weight"), region)
        for name, region in regions.items()
    ]
    log = ReadLog()
    for name, tensor in stream([("source", checkpoint.files[0], planned)], log):
        (top, bottom), (left, right) = regions[name.split(".")[-2]]
        assert torch.equal(tensor, expected[name.removeprefix(f"{OWNER}.")][top:bottom, left:right])
    assert log.bytes_read == 2 * 3 * 8 * 64


def test_what_is_read_for_one_of_two_that_stand_in_turns_is_counted(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "m", "gpt_oss", fuse(separate(), LAYOUTS["gpt_oss"], True)))
    log = ReadLog()
    list(stream(reads(checkpoint, f"{OWNER}.0.up_proj.weight", f"{OWNER}.1.gate_proj.weight"), log))
    assert log.bytes_read == 2 * (2 * WIDTH * HIDDEN) * 2


def test_a_destination_is_filled(tmp_path: Path) -> None:
    expected = separate()
    checkpoint = open_checkpoint(write(tmp_path / "m", "gpt_oss", fuse(expected, LAYOUTS["gpt_oss"], True)))
    stacked = torch.zeros(2 * WIDTH, HIDDEN, dtype=torch.bfloat16)
    places = {f"{OWNER}.2.gate_proj.weight": stacked[:WIDTH], f"{OWNER}.2.up_proj.weight": stacked[WIDTH:]}
    list(stream(reads(checkpoint, *places), ReadLog(), lambda read: places[read.name]))
    assert torch.equal(stacked, torch.cat([expected["2.gate_proj.weight"], expected["2.up_proj.weight"]]))


def test_mxfp4_experts_of_gpt_oss_decode_to_what_their_blocks_say(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = {"gate_up_proj": (2 * WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}
    fused, expected = {}, {}
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    for name, (out, columns) in rows.items():
        blocks = torch.randint(256, (EXPERTS, out, columns // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(120, 130, blocks.shape[:3], generator=generator, dtype=torch.uint8)
        fused |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        fused[f"{name}_bias"] = torch.zeros(EXPERTS, out, dtype=torch.bfloat16)
        pairs = torch.stack([values[(blocks & 15).long()], values[(blocks >> 4).long()]], -1).flatten(-2)
        expected[name] = (pairs * torch.exp2(scales.float() - 127).unsqueeze(-1)).flatten(-2)
    said = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    checkpoint = open_checkpoint(write(tmp_path / "m", "gpt_oss", fused, quantization_config=said))
    assert checkpoint.format(f"{OWNER}.0.up_proj").name == "mxfp4"
    for expert in range(EXPERTS):
        gate, up, down = (checkpoint.dequantize(f"{OWNER}.{expert}.{name}") for name in SIZES)
        assert torch.equal(gate, expected["gate_up_proj"][expert, 0::2])
        assert torch.equal(up, expected["gate_up_proj"][expert, 1::2])
        assert torch.equal(down, expected["down_proj"][expert])
    log = ReadLog()
    list(stream(reads(checkpoint), log))
    assert log.bytes_read == HIDDEN * 4 + sum(tensor.nbytes for tensor in fused.values())


def test_a_report_can_say_which_slice_of_the_file_a_tensor_is(tmp_path: Path) -> None:
    def text(model_type: str, name: str, local: str = "weight") -> str:
        fused = fuse(separate(), LAYOUTS[model_type], True)
        folder = tmp_path / f"{model_type}-{name}-{local}"
        view = open_checkpoint(write(folder, model_type, fused)).entries[f"{OWNER}.2.{name}.{local}"].view
        assert view is not None
        return view.text.removeprefix(f"{OWNER}.")

    assert text("gpt_oss", "up_proj") == "gate_up_proj[2, :, 1::2].T"
    assert text("gpt_oss", "gate_proj", "bias") == "gate_up_proj_bias[2, 0::2]"
    assert text("llama4_text", "up_proj") == "gate_up_proj[2, :, 32:64].T"
    assert text("qwen3_moe", "up_proj") == "gate_up_proj[2, 32:64]"
    assert text("qwen3_moe", "down_proj") == "down_proj[2]"


@pytest.mark.parametrize(
    ("model_type", "changes", "expected"),
    [
        ("gpt_oss", {"num_local_experts": 4}, "[4, 64, 64]"),
        ("gpt_oss", {"hidden_size": 128}, "[3, 128, 64]"),
        ("qwen3_moe", {"moe_intermediate_size": 16}, "[3, 32, 64]"),
        ("qwen3_moe", {"moe_intermediate_size": None}, "[3, 0, 64]"),
    ],
)
def test_a_tensor_that_contradicts_the_config_is_named_with_the_shape_it_should_have(
    model_type: str, changes: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    fused = fuse(separate(), LAYOUTS[model_type], False)
    with pytest.raises(InconsistentFormatError) as caught:
        open_checkpoint(write(tmp_path / "m", model_type, {"gate_up_proj": fused["gate_up_proj"]}, **changes))
    assert caught.value.tensor == f"{OWNER}.gate_up_proj"
    assert expected in str(caught.value.rule)
    assert caught.value.file == str(tmp_path / "m" / "model.safetensors")


def test_a_layout_that_is_not_known_stays_one_module(tmp_path: Path) -> None:
    fused = fuse(separate(), LAYOUTS["qwen3_moe"], False)
    folder = write(tmp_path / "m", "qwen3_moe", fused)
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, "model_type": "unheard_of"}))
    assert set(open_checkpoint(folder).modules) == {"model.norm", OWNER}


def test_an_index_names_the_tensors_of_the_files_not_their_slices(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", "qwen3_moe", fuse(separate(), LAYOUTS["qwen3_moe"], False))
    names = ["model.norm.weight", f"{OWNER}.gate_up_proj", f"{OWNER}.down_proj"]
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = open_checkpoint(folder)
    checkpoint.check_index()
    assert checkpoint.file_of(f"{OWNER}.1.down_proj") == folder / "model.safetensors"
