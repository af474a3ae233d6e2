"""A map in a model: what is reported, kept in another dtype, tied, computed anew, counted, and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_mixed import EnhancedModelLoader, ExpertActivationTracker, load_model_with_enhanced_features, load_plan
from sglang_mixed.errors import CoverageError, EngineError, ShapeError, UnsupportedError
from sglang_mixed.plan import Plan, make_plan
from sglang_mixed.torch import MixedPrecisionLinear

from .. import models as checkpoints
from ..engine.launch import TINY
from .models import build_on_meta, dequantized, relative_error

IDS = torch.arange(4, 36).reshape(2, 16)


def test_the_loader_reports_generates_and_counts(tmp_path: Path) -> None:
    model, reference = build_on_meta(TINY / "bf16"), dequantized(make_plan(TINY / "map.yaml"), tmp_path / "reference")
    loader = EnhancedModelLoader(TINY / "map.yaml", enable_expert_tracking=True)
    report = loader.load_model(model, enable_moe_tracking=True)
    plan = make_plan(TINY / "map.yaml")
    assert report["loaded"] == len(plan.modules) == sum(one["modules"] for one in report["by_format"].values())
    assert report["bytes"] == report["planned_bytes"] == plan.weight_bytes()
    assert report["saved"] == plan.bf16_bytes - plan.weight_bytes() > 0 and report["seconds"] > 0
    routed = count_by_routers(reference)
    ours, theirs = (one.generate(IDS[:1], max_new_tokens=8, do_sample=False) for one in (model, reference))
    assert torch.equal(ours, theirs)
    counted = {
        (one["layer_id"], one["expert_id"]): one["total_tokens_processed"] for one in loader.get_expert_stats().values()
    }
    assert counted == routed
    top = loader.get_top_experts(1)[0]
    assert loader.get_layer_stats()[top["layer_id"]]["experts"]
    loader.export_expert_stats(tmp_path / "experts.json")
    assert set(json.loads((tmp_path / "experts.json").read_text())) >= {"expert_stats", "layer_stats", "top_experts"}
    loader.reset_expert_stats()
    assert loader.get_expert_stats() == {} and isinstance(loader.get_expert_tracker(), ExpertActivationTracker)


def count_by_routers(reference: Any) -> dict[tuple[int, int], int]:
    """Filled, as the reference runs, from what its own routers choose."""
    counted: dict[tuple[int, int], int] = {}

    def watch(layer: int) -> Any:
        def record(module: Any, arguments: Any, output: Any) -> None:
            for expert in output[2].flatten().tolist():
                counted[layer, expert] = counted.get((layer, expert), 0) + 1

        return record

    for number, layer in enumerate(reference.model.layers):
        layer.mlp.gate.register_forward_hook(watch(number))
    return counted


def test_the_cache_is_counted_and_is_no_saved_memory() -> None:
    model = build_on_meta(TINY / "bf16")
    loader = EnhancedModelLoader(TINY / "map.yaml", cache_bytes=64 << 20)
    saved = loader.load_model(model)["memory_saved_mb"]
    for _ in range(2):
        model(IDS)
    stats = loader.get_memory_stats()
    cache = stats["dequantization_cache"]
    assert cache["hits"] and cache["misses"] == cache["weights"] and 0 < cache["bytes"] <= cache["limit_bytes"]
    assert stats["weight_bytes"] == stats["planned_bytes"]
    assert stats["memory_saved_mb"] == pytest.approx(saved - cache["bytes"] / 2**20)


def test_without_tracking_there_is_nothing_to_ask() -> None:
    loader = EnhancedModelLoader(TINY / "map.yaml", enable_expert_tracking=False)
    with pytest.raises(EngineError, match="not counted"):
        loader.get_top_experts()
    with pytest.raises(EngineError, match="no model is loaded"):
        loader.get_memory_stats()


def test_the_function_returns_the_report_and_the_loader() -> None:
    found = load_model_with_enhanced_features(build_on_meta(TINY / "bf16"), TINY / "int4.yaml")
    assert found["loaded"] and found["loader"].get_expert_stats() == {}


def test_a_model_with_weights_is_filled_like_one_without(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    plan = make_plan(TINY / "map.yaml")
    real = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TINY / "bf16"), dtype=torch.float32)
    bare = build_on_meta(TINY / "bf16")
    for model in (real, bare):
        load_plan(model, plan)
    with torch.no_grad():
        assert torch.equal(real(IDS).logits, bare(IDS).logits)


def test_what_is_not_compressed_has_one_dtype_and_casts_are_told(tmp_path: Path) -> None:
    fp16, fp8 = (checkpoints.write(tmp_path / kind, kind) for kind in ("fp16", "fp8"))
    described = checkpoints.write_map(tmp_path, {"model.layers.0.*norm": "fp8"}, fp16=fp16, fp8=fp8)
    model = build_on_meta(fp16)
    report = load_plan(model, make_plan(described))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert report.casts["model.layers.0.input_layernorm.weight"] == "bfloat16 -> float16"
    assert model(IDS).logits.isfinite().all()
    model = build_on_meta(fp16)
    load_plan(model, make_plan(described), dtype=torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


class Block(torch.nn.Module):
    """Not of transformers: linears, a norm and a buffer, in the checkpoint's names."""

    def __init__(self, columns: int = checkpoints.HIDDEN) -> None:
        super().__init__()
        self.model = torch.nn.Module()
        self.model.embed_tokens = torch.nn.Embedding(checkpoints.VOCABULARY, checkpoints.HIDDEN)
        self.model.norm = torch.nn.LayerNorm(checkpoints.HIDDEN, bias=False)
        self.lm_head = torch.nn.Linear(columns, checkpoints.VOCABULARY, bias=False)
        self.register_buffer("table", torch.arange(4.0), persistent=False)


def block_checkpoint(folder: Path, **changes: Any) -> Path:
    kept = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")

    def change(tensors: checkpoints.Tensors) -> None:
        for name in set(tensors) - set(kept):
            del tensors[name]

    return checkpoints.write(folder / "bf16", layers=0, experts=0, change=change, **changes)


def test_any_module_is_filled_by_its_names(tmp_path: Path) -> None:
    plan = make_plan(checkpoints.write_map(tmp_path, {}, bf16=block_checkpoint(tmp_path)))
    model = Block()
    load_plan(model, plan)
    assert isinstance(model.lm_head, MixedPrecisionLinear)
    assert torch.equal(model.lm_head.weight, plan.checkpoints["bf16"].read_tensor("lm_head.weight"))
    assert torch.equal(model.table, torch.arange(4.0))


def skeleton(plan: Plan) -> torch.nn.Module:
    """Modules at every name of the plan: linears, lists of experts among them, and what has a vector or a table."""
    root = torch.nn.Module()
    for name, planned in plan.modules.items():
        parent, (*owners, last) = root, name.split(".")
        for owner in owners:
            if not hasattr(parent, owner):
                parent.add_module(owner, torch.nn.Module())
            parent = parent.get_submodule(owner)
        leaf = torch.nn.Module()
        if last.endswith(("proj", "gate")):
            leaf = torch.nn.Linear(*reversed(planned.format.shape), bias=False)
        else:
            leaf.register_parameter("weight", torch.nn.Parameter(torch.empty(planned.format.shape)))
        parent.add_module(last, leaf)
    return root


def test_every_expert_that_is_a_module_of_its_own_becomes_linears_of_its_format() -> None:
    plan = make_plan(TINY / "experts.yaml")
    model = skeleton(plan)
    assert load_plan(model, plan).stats["weight_bytes"] == plan.weight_bytes()
    for name, planned in plan.modules.items():
        source = plan.checkpoints[planned.source]
        assert relative_error(model.get_submodule(name).weight, source.dequantize(name)) <= 1e-2
        assert isinstance(model.get_submodule(name), MixedPrecisionLinear) == name.endswith(("proj", "gate"))


def test_tied_weights_stay_one(tmp_path: Path) -> None:
    folder = block_checkpoint(tmp_path, tie_word_embeddings=True)
    model = Block()
    model.lm_head.weight = model.model.embed_tokens.weight
    load_plan(model, make_plan(checkpoints.write_map(tmp_path, {}, bf16=folder)))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_model_that_lacks_a_place_or_has_one_too_many_is_refused(tmp_path: Path) -> None:
    plan = make_plan(checkpoints.write_map(tmp_path, {}, bf16=block_checkpoint(tmp_path)))
    more, less = Block(), Block()
    more.extra = torch.nn.Linear(2, 2)
    del less.model.norm
    for model, message in ((more, r"no weights for extra\.weight"), (less, r"no place for model\.norm\.weight")):
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        with pytest.raises(CoverageError, match=message):
            load_plan(model, plan)
        assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_other_sizes_are_refused(tmp_path: Path) -> None:
    plan = make_plan(checkpoints.write_map(tmp_path, {}, bf16=block_checkpoint(tmp_path)))
    with pytest.raises(ShapeError, match=r"the model's layer is \[96, 8\] without a bias"):
        load_plan(Block(columns=8), plan)
    model = Block()
    model.model.norm = torch.nn.LayerNorm(8, bias=False)
    with pytest.raises(ShapeError, match=r"the model's is \[8\]"):
        load_plan(model, plan)


def test_a_buffer_that_nothing_can_compute_is_refused(tmp_path: Path) -> None:
    plan = make_plan(checkpoints.write_map(tmp_path, {}, bf16=block_checkpoint(tmp_path)))
    with torch.device("meta"):
        model = Block()
    with pytest.raises(CoverageError, match="nothing tells the values of a buffer"):
        load_plan(model, plan)


def test_experts_of_other_sizes_or_with_biases_are_refused() -> None:
    plan = make_plan(TINY / "map.yaml")
    for change, message in (("num_experts", "the model's experts are"), ("has_bias", "are with biases")):
        model = build_on_meta(TINY / "bf16")
        experts = model.model.layers[0].mlp.experts
        if change == "num_experts":
            experts.down_proj = torch.nn.Parameter(experts.down_proj[:4])
        else:
            experts.has_bias = True
        with pytest.raises(ShapeError, match=message):
            load_plan(model, plan)


def test_quantized_weights_of_other_layers_are_refused(tmp_path: Path) -> None:
    fp8, bf16 = (checkpoints.write(tmp_path / kind, kind, layers=1, experts=0) for kind in ("fp8", "bf16"))
    plan = make_plan(checkpoints.write_map(tmp_path, {"**.q_proj": "fp8"}, default="bf16", bf16=bf16, fp8=fp8))
    model = build_on_meta(bf16)

    class Special(torch.nn.Linear):
        """One that may read its weight in a way of its own."""

    model.model.layers[0].self_attn.q_proj = Special(checkpoints.HIDDEN, checkpoints.HIDDEN, bias=False)
    with pytest.raises(UnsupportedError, match="Special cannot take a quantized weight"):
        load_plan(model, plan)


def test_experts_that_are_modules_of_their_own_are_counted_by_their_router(tmp_path: Path) -> None:
    from sglang_mixed.torch.tracking import track_experts

    class MoE(torch.nn.Module):
        """As transformers 4 has it: a linear router that returns logits, a list of experts."""

        def __init__(self) -> None:
            super().__init__()
            self.gate, self.top_k = torch.nn.Linear(8, 4, bias=False), 2
            self.experts = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.gate(x)

    layer = torch.nn.Module()
    layer.mlp = MoE()
    model = torch.nn.Module()
    model.model = torch.nn.Module()
    model.model.layers = torch.nn.ModuleList([layer])
    tracker = ExpertActivationTracker()
    handles = track_experts(model, tracker)
    logits = layer.mlp(torch.randn(5, 8))
    chosen = torch.bincount(logits.topk(2).indices.flatten(), minlength=4)
    for expert in range(4):
        assert tracker.get_expert_stats(0, expert).get("total_tokens_processed", 0) == chosen[expert]
    for handle in handles:
        handle.remove()
    layer.mlp(torch.randn(5, 8))
    assert sum(one["total_tokens_processed"] for one in tracker.get_expert_stats().values()) == 10
