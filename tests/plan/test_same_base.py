"""One model behind all sources: configs, sampled weights, the tolerance, and smoothing folded into norms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sglang_mixed.checkpoint import Checkpoint, open_checkpoint
from sglang_mixed.errors import DifferentBaseError, MixedPrecisionError, SmoothingError
from sglang_mixed.plan import same_base

from ..models import Tensors, write
from .conftest import Mapped

EXPERTS = {"**.experts.**": "fp8"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "gelu"),
        ("rope_theta", 1e6),
        ("num_experts_per_tok", 4),
        ("model_type", "llama"),
        ("head_dim", 32),
    ],
)
def test_a_config_of_another_model(mapped: Mapped, tmp_path: Path, field: str, value: object) -> None:
    other = write(tmp_path / "other", "fp8", **{field: value})
    base = write(tmp_path / "base", hidden_act="silu")
    with pytest.raises(DifferentBaseError) as caught:
        mapped(EXPERTS, bf16=base, fp8=other)
    assert field in str(caught.value) and repr(value) in str(caught.value)
    assert caught.value.file == str(other / "config.json")
    assert mapped(EXPERTS, bf16=base, fp8=other, options={"allow_different_base": True})


def test_the_engines_own_base_must_agree_too(mapped: Mapped, tmp_path: Path) -> None:
    other = write(tmp_path / "other", rope_theta=5.0)
    with pytest.raises(DifferentBaseError, match="rope_theta"):
        mapped(EXPERTS, options={"base": other})


def test_the_two_places_of_rope_theta(mapped: Mapped, tmp_path: Path) -> None:
    new = {"rope_theta": None, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}
    assert mapped(EXPERTS, fp8=write(tmp_path / "new", "fp8", **new))
    new["rope_parameters"] = {"rope_theta": 7.0}
    with pytest.raises(DifferentBaseError, match="rope_theta"):
        mapped(EXPERTS, fp8=write(tmp_path / "other", "fp8", **new))


@pytest.mark.parametrize("name", ["model.embed_tokens", "model.layers.1.mlp.gate", "model.layers.0.self_attn.k_norm"])
def test_one_changed_weight_is_found(mapped: Mapped, tmp_path: Path, name: str) -> None:
    def change(tensors: Tensors) -> None:
        tensors[f"{name}.weight"].mul_(1.5)

    other = write(tmp_path / "other", "fp8", change=change)
    with pytest.raises(DifferentBaseError) as caught:
        mapped(EXPERTS, fp8=other)
    assert caught.value.tensor == f"{name}.weight" and caught.value.file == str(other / "model.safetensors")
    assert "fp8 was made from another model than bf16" in str(caught.value)
    plan = mapped(EXPERTS, fp8=other, options={"allow_different_base": True})
    assert any("another model" in warning and name in warning for warning in plan.warnings)


def test_a_different_seed_is_a_different_model(mapped: Mapped, tmp_path: Path) -> None:
    with pytest.raises(DifferentBaseError, match="tensors differ"):
        mapped(EXPERTS, fp8=write(tmp_path / "other", "fp8", seed=1))


def test_rounding_to_another_16_bit_type_is_tolerated(mapped: Mapped, tmp_path: Path) -> None:
    def small(tensors: Tensors) -> None:
        tensors["model.norm.weight"].mul_(1e-4)
        tensors["model.embed_tokens.weight"].mul_(1e-6)

    half = write(tmp_path / "half", "fp16", change=small)
    assert mapped({"**.experts.**": "half"}, bf16=write(tmp_path / "base", change=small), half=half)


def test_a_weight_that_became_nan_is_different(mapped: Mapped, tmp_path: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors["model.layers.0.mlp.gate.weight"].fill_(float("nan"))

    with pytest.raises(DifferentBaseError):
        mapped(EXPERTS, fp8=write(tmp_path / "other", "fp8", change=spoil))


def test_little_is_read(mapped: Mapped, monkeypatch: pytest.MonkeyPatch) -> None:
    done: dict[str, int] = {}
    read_into = same_base.read_into

    def counted(descriptor: int, path: Path, name: str, position: int, buffer: memoryview) -> None:
        done[str(path)] = done.get(str(path), 0) + len(buffer)
        read_into(descriptor, path, name, position, buffer)

    monkeypatch.setattr(same_base, "read_into", counted)
    monkeypatch.setattr(Checkpoint, "read_tensor", None)
    mapped(EXPERTS)
    assert len(done) == 2 and all(count < 20_000 for count in done.values())


def test_a_large_embedding_is_sampled_from_end_to_end(tmp_path: Path) -> None:
    def grow(tensors: Tensors) -> None:
        tensors["model.embed_tokens.weight"] = torch.zeros(4096, 256, dtype=torch.bfloat16)

    base, same = (open_checkpoint(write(tmp_path / name, change=grow)) for name in ("a", "b"))
    assert not same_base.compare_weights(base, {"b": same})["b"].others
    for row in (0, -1):

        def change(tensors: Tensors, row: int = row) -> None:
            grow(tensors)
            tensors["model.embed_tokens.weight"][row] = 1

        other = open_checkpoint(write(tmp_path / f"c{row}", change=change))
        assert list(same_base.compare_weights(base, {"c": other})["c"].others) == ["model.embed_tokens"]


def smoothed(*norms: str) -> object:
    def change(tensors: Tensors) -> None:
        for norm in norms:
            tensors[f"{norm}.weight"].mul_(0.5)

    return change


INPUT, POST = "model.layers.1.input_layernorm", "model.layers.0.post_attention_layernorm"


def test_a_norm_with_smoothing_and_its_readers_from_one_source(mapped: Mapped, tmp_path: Path) -> None:
    source = write(tmp_path / "s", "gptq", change=smoothed(INPUT, POST))  # type: ignore[arg-type]
    readers = {"model.layers.1.self_attn.{q,k,v}_proj": "gptq", "model.layers.0.mlp.{gate,experts.*.*}": "gptq"}
    assert mapped({INPUT: "gptq", POST: "gptq", **readers}, gptq=source)
    assert mapped({"model.layers.*.self_attn.o_proj": "gptq"}, gptq=source)
    assert mapped({"model.layers.0.self_attn.*_proj": "gptq"}, gptq=source)


@pytest.mark.parametrize(
    "mapping",
    [
        {INPUT: "gptq"},
        {"model.layers.1.self_attn.{q,k,v}_proj": "gptq"},
        {POST: "gptq", "model.layers.0.mlp.experts.*.*": "gptq"},
        {"**": "gptq", "model.layers.0.mlp.gate": "bf16"},
        {"**": "gptq", POST: "bf16"},
    ],
)
def test_smoothing_that_is_torn_is_refused_with_the_lines_to_add(
    mapped: Mapped, tmp_path: Path, mapping: dict[str, str]
) -> None:
    source = write(tmp_path / "s", "gptq", change=smoothed(INPUT, POST))  # type: ignore[arg-type]
    with pytest.raises(SmoothingError) as caught:
        mapped(mapping, gptq=source)
    assert "gptq changed model.layers." in str(caught.value) and "layernorm" in str(caught.value.tensor)
    advised = {
        line.split('"')[1]: line.split()[-1] for line in str(caught.value.remedy).splitlines() if ": gptq" in line
    }
    patterns = {name: source for name, source in mapping.items() if name not in (POST, "model.layers.0.mlp.gate")}
    assert advised and mapped({**patterns, **advised}, gptq=source)


def test_the_final_norm_belongs_to_the_head(mapped: Mapped, tmp_path: Path) -> None:
    source = write(tmp_path / "s", "gptq", change=smoothed("model.norm"))  # type: ignore[arg-type]
    assert mapped({"model.norm": "gptq", "lm_head": "gptq"}, gptq=source)
    with pytest.raises(SmoothingError, match=r"model\.norm"):
        mapped({"lm_head": "gptq"}, gptq=source)


def test_a_router_may_change_with_its_norm(mapped: Mapped, tmp_path: Path) -> None:
    change = smoothed(POST, "model.layers.0.mlp.gate")
    source = write(tmp_path / "s", "gptq", change=change)  # type: ignore[arg-type]
    assert mapped({"model.layers.0.{mlp.**,post_attention_layernorm}": "gptq"}, gptq=source)
    with pytest.raises(MixedPrecisionError):
        mapped({"**.experts.**": "gptq"}, gptq=source)


def test_sources_that_are_both_smoothed_do_not_mix(mapped: Mapped, tmp_path: Path) -> None:
    one = write(tmp_path / "one", "fp8", change=smoothed(INPUT))  # type: ignore[arg-type]
    two = write(tmp_path / "two", "fp8", change=smoothed(INPUT))  # type: ignore[arg-type]
    with pytest.raises(SmoothingError):
        mapped({"**": "fp8", INPUT: "other"}, fp8=one, other=two)
