"""The maps that the guides show, with the tiny checkpoints for their paths."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from sglang_mixed.config import load_map
from sglang_mixed.engine.arguments import translate
from sglang_mixed.errors import MapSyntaxError, PatternError, UnknownKeyError
from sglang_mixed.plan import Plan, make_plan

from .. import models
from ..engine.launch import TINY

SOURCES = """\
mixed_precision:
  fp16_path: "TINY/bf16"
  fp8_path: "TINY/fp8-block"
  INT4_path: "TINY/gptq-int4"

"""
ATTENTION = """\
  weight_mapping:
    "model.layers.0.self_attn.q_proj.weight": "fp16"
    "model.layers.0.self_attn.k_proj.weight": "fp16"
    "model.layers.0.self_attn.v_proj.weight": "fp16"
    "model.layers.0.self_attn.o_proj.weight": "fp16"
"""
DENSE = """\
    "model.layers.0.mlp.gate_proj.weight": "fp8"
    "model.layers.0.mlp.up_proj.weight": "fp8"
    "model.layers.0.mlp.down_proj.weight": "fp8"
"""
EXPERTS = """\
    "model.layers.0.mlp.experts.0.gate_proj.weight": "INT4"
    "model.layers.0.mlp.experts.0.up_proj.weight": "INT4"
    "model.layers.0.mlp.experts.0.down_proj.weight": "INT4"
"""
OTHERS = """\
    "model.layers.0.input_layernorm.weight": "fp16"
    "model.layers.0.post_attention_layernorm.weight": "fp16"
    "model.embed_tokens.weight": "fp16"
    "model.norm.weight": "fp16"
    "lm_head.weight": "fp16"
"""
SECTIONS = """
inference:
  max_seq_length: 4096
  max_batch_size: 32
  dtype: "bfloat16"
  device_map: "auto"

server:
  host: "127.0.0.1"
  port: 8080
  max_workers: 4
"""
EVERY_LAYER = """\
mixed_precision:
  weight_mapping:
    "model.layers.*.mlp.experts.*.gate_proj.weight": "gptq_int4"
    "model.layers.*.mlp.experts.*.up_proj.weight": "gptq_int4"
    "model.layers.*.mlp.experts.*.down_proj.weight": "gptq_int4"
"""


def written(folder: Path, text: str, int4: str = "int4") -> Path:
    file = folder / "mixed_precision_config.yaml"
    file.write_text(text.replace("TINY", str(TINY)).replace("INT4", int4))
    assert yaml.safe_load(file.read_text())  # the guides' own check of a file
    return file


def sources(plan: Plan) -> dict[str, str]:
    return {name: module.source for name, module in plan.modules.items()}


@pytest.mark.parametrize(
    ("text", "int4"),
    [
        (SOURCES + ATTENTION + DENSE + EXPERTS + SECTIONS, "int4"),  # API guide
        (SOURCES + ATTENTION + DENSE + EXPERTS, "gptq_int4"),  # TP/DP guide
        (SOURCES + ATTENTION + DENSE + EXPERTS + OTHERS, "int4"),  # native-integration guide
    ],
)
def test_a_guides_map_is_followed(text: str, int4: str, tmp_path: Path) -> None:
    """What it does not name is the base's; lines for a dense MLP beside experts map nothing, and that is said."""
    plan = make_plan(written(tmp_path, text, int4), base=str(TINY / "bf16"))
    found = sources(plan)
    expert = {f"model.layers.0.mlp.experts.0.{name}_proj" for name in ("gate", "up", "down")}
    assert {name for name, source in found.items() if source == int4} == expert
    assert {source for name, source in found.items() if name not in expert} == {"fp16"}
    said = [warning for warning in plan.warnings if "maps nothing" in warning]
    assert [warning.split('"')[1] for warning in said] == [line.split('"')[1] for line in DENSE.splitlines()]
    assert all(warning.endswith("that layer of the model has experts") for warning in said)


def test_its_sections_become_sglangs_arguments(tmp_path: Path) -> None:
    file = written(tmp_path, SOURCES + ATTENTION + EXPERTS + SECTIONS)
    given = {"enable_mixed_precision": True, "mixed_precision_config": str(file), "model_path": str(TINY / "bf16")}
    found = translate(given, set())
    assert {name: found[name] for name in ("context_length", "max_running_requests", "dtype")} == {
        "context_length": 4096,
        "max_running_requests": 32,
        "dtype": "bfloat16",
    }
    assert (found["host"], found["port"], found["tokenizer_worker_num"]) == ("127.0.0.1", 8080, 4)


def test_the_same_map_serves_a_dense_model(tmp_path: Path) -> None:
    base, fp8 = models.write(tmp_path / "bf16", experts=0), models.write(tmp_path / "fp8", "fp8", experts=0)
    text = f"mixed_precision:\n  fp16_path: {base}\n  fp8_path: {fp8}\n" + ATTENTION + DENSE + EXPERTS
    plan = make_plan(written(tmp_path, text, "fp8"), base=str(base))
    mlp = {f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert {name for name, source in sources(plan).items() if source == "fp8"} == mlp
    assert sum(warning.endswith("that layer of the model has a dense MLP") for warning in plan.warnings) == 3


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.7.mlp.gate_proj.weight",  # no such layer
        "model.layers.0.mlp.experts.99.gate_proj.weight",  # no such expert
        "model.layers.0.mlp.gate_projection.weight",
        "model.layers.0.gate_proj.weight",
        "model.layers.{0,1}.mlp.gate_proj.weight",  # a pattern was written to match something
        "model.layers.*.mlp.gate_proj",
    ],
)
def test_a_line_that_no_kind_of_layer_explains_is_refused(name: str, tmp_path: Path) -> None:
    file = written(tmp_path, SOURCES + ATTENTION + f'    "{name}": "fp8"\n')
    with pytest.raises(PatternError, match="matches no weight of the model"):
        make_plan(file, base=str(TINY / "bf16"))


def test_globs_reach_every_layer_of_a_map_that_has_sources(tmp_path: Path) -> None:
    with pytest.raises(MapSyntaxError, match="no source is declared"):
        load_map(written(tmp_path, EVERY_LAYER))
    file = written(tmp_path, EVERY_LAYER.replace("mixed_precision:\n", SOURCES), "gptq_int4")
    found = sources(make_plan(file, base=str(TINY / "bf16")))
    assert all(source == ("gptq_int4" if ".experts." in name else "fp16") for name, source in found.items())


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ("loading_strategy: {enabled: true, base_precision: fp8}\n", "loading_strategy"),
        ("inference: {mixed_precision: {use_cache: true}}\n", "inference.mixed_precision"),
    ],
)
def test_keys_of_the_forks_own_map_that_mean_nothing_here_are_named(more: str, key: str, tmp_path: Path) -> None:
    text = SOURCES.replace("\n  fp16", "\n  base_model_path: TINY/fp8-block\n  fp16") + ATTENTION
    assert set(load_map(written(tmp_path, text)).sources) == {"base_model", "fp16", "fp8", "int4"}
    with pytest.raises(UnknownKeyError, match=f"unknown key '{key}'"):
        load_map(written(tmp_path, text + more))
