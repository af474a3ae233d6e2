"""What weight names mean."""

from __future__ import annotations

import pytest

from sglang_mixed.memory import module_kind
from sglang_mixed.plan import families
from sglang_mixed.plan.families import base_facts, cut_role, never_loaded, norm_readers, num_experts
from sglang_mixed.plan.fused import running_together
from tests.engine.families import EXPERTS, FAMILIES, LAYERS, Family

LAYER = "model.layers.3"


def below(*names: str) -> dict[str, object]:
    return {f"{LAYER}.{name}": None for name in names}


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("self_attn.q_proj", ("self_attn", "qkv_proj")),
        ("self_attn.o_proj", None),
        ("mlp.up_proj", ("mlp", "gate_up_proj")),
        ("mlp.experts.7.up_proj", ("mlp.experts", "w13")),
        ("mlp.experts.7.down_proj", ("mlp.experts", "w2")),
        ("mlp.shared_expert.up_proj", ("mlp.shared_expert", "gate_up_proj")),
        ("block_sparse_moe.experts.0.w3", ("block_sparse_moe.experts", "w13")),
        ("self_attn.kv_a_proj_with_mqa", ("self_attn", "fused_qkv_a_proj_with_mqa")),
        ("mlp.gate", None),
    ],
)
def test_fused_groups(name: str, group: tuple[str, str] | None) -> None:
    expected = (f"{LAYER}.{group[0]}", group[1]) if group else None
    assert running_together(f"{LAYER}.{name}") == expected


def test_readers_of_norms() -> None:
    modules = below(
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate",
        "mlp.experts.0.gate_proj", "mlp.experts.0.up_proj", "mlp.experts.0.down_proj",
        "mlp.experts.1.gate_proj", "mlp.experts.1.up_proj", "mlp.shared_expert.up_proj",
    ) | {"lm_head": None}  # fmt: skip
    assert len(norm_readers(f"{LAYER}.input_layernorm", modules)) == 3
    readers = norm_readers(f"{LAYER}.post_attention_layernorm", modules)
    assert f"{LAYER}.mlp.experts.1.up_proj" in readers and f"{LAYER}.mlp.gate" in readers
    assert not any("down_proj" in name for name in readers) and len(readers) == 6
    assert norm_readers(f"{LAYER}.self_attn.q_norm", modules) == []
    assert norm_readers("model.norm", modules) == ["lm_head"]
    assert norm_readers("model.norm", {}) == []


def test_latent_attention_and_sandwich_norms() -> None:
    latent = below("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.q_b_proj", "self_attn.kv_b_proj")
    assert len(norm_readers(f"{LAYER}.input_layernorm", latent)) == 2
    assert norm_readers(f"{LAYER}.self_attn.kv_a_layernorm", latent) == [f"{LAYER}.self_attn.kv_b_proj"]
    sandwich = below("mlp.gate_proj", "mlp.up_proj", "pre_feedforward_layernorm")
    assert norm_readers(f"{LAYER}.post_attention_layernorm", sandwich) == []
    assert len(norm_readers(f"{LAYER}.pre_feedforward_layernorm", sandwich)) == 2


def test_what_the_engine_never_loads() -> None:
    modules = [
        "model.layers.1.self_attn.rotary_emb", "model.layers.2.eh_proj", "model.layers.5.x", "lm_head",
        "model.layers.1.x",
    ]  # fmt: skip
    config = {"num_hidden_layers": 2, "tie_word_embeddings": True}
    assert never_loaded(modules, config) == set(modules[:4])
    assert "lm_head" not in never_loaded(modules, {**config, "architectures": ["Qwen3MoeForCausalLM"]})
    assert "lm_head" in never_loaded(modules, {**config, "architectures": ["DeepseekV2ForCausalLM"], "num_experts": 8})
    assert "lm_head" not in never_loaded(modules, {**config, "tie_word_embeddings": False})
    assert never_loaded(modules, {"text_config": config}) == set(modules[:4])


def test_facts_under_every_name() -> None:
    assert (
        base_facts({"n_routed_experts": 8, "dtype": "x"}) == base_facts({"num_local_experts": 8}) == {"num_experts": 8}
    )
    assert base_facts({"text_config": {"hidden_size": 5}}) == {"hidden_size": 5}
    assert num_experts({"text_config": {"num_local_experts": 8}}) == 8 and num_experts({}) == 0


@pytest.mark.parametrize(
    ("name", "role"),
    [("a.q_proj", "out"), ("a.down_proj", "in"), ("lm_head", "out"), ("mlp.gate", None), ("q_norm", None)],
)
def test_how_ranks_cut(name: str, role: str | None) -> None:
    assert cut_role(name) == role


def module_names(family: Family) -> dict[str, object]:
    """All modules of a family's layers."""
    names = [
        f"{family.prefix}model.layers.{layer}.{local}"
        for layer in range(LAYERS)
        for local in (*family.matrices(layer), *(name.rpartition(".")[0] for name in family.others(layer)))
    ]
    return dict.fromkeys(names)


#: Last name part -> (kind of module, side that tensor parallelism cuts), of everything that a layer may hold.
CLASSES = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "q_b_proj", "kv_b_proj", "self_attn"), ("attention", "out")),
    **dict.fromkeys(("q_a_proj", "kv_a_proj_with_mqa"), ("attention", None)),
    "o_proj": ("attention", "in"),
    **dict.fromkeys(("gate_proj", "up_proj", "w1", "w3"), ("mlp", "out")),
    **dict.fromkeys(("down_proj", "w2"), ("mlp", "in")),
    "experts": ("experts", None),
    **dict.fromkeys(("gate", "router"), ("router", None)),
    "shared_expert_gate": ("mlp", None),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_module_of_every_family_is_known(name: str) -> None:
    for module in module_names(FAMILIES[name]):
        last = module.rpartition(".")[2]
        kind, role = ("norm", None) if last.endswith("norm") else CLASSES[last]
        expected = "experts" if ".experts." in module else kind
        assert (module_kind(module), cut_role(module)) == (expected, role), module
        assert families.runs_in_16_bits(module) == (kind in ("norm", "router") or last == "shared_expert_gate"), module


@pytest.mark.parametrize("name", FAMILIES)
def test_norms_are_read_by_all_that_reads_hidden_states(name: str) -> None:
    modules = module_names(FAMILIES[name])
    read = [reader for module in modules for reader in norm_readers(module, modules)]
    inner = ("o_proj", "down_proj", "w2", "norm", "self_attn")
    assert sorted(read) == sorted(module for module in modules if not module.endswith(inner))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_compared_by_its_norms_and_routers(name: str) -> None:
    modules = module_names(FAMILIES[name])
    expected = [module for module in modules if module.endswith("norm") or families.is_router(module)]
    assert families.compared(modules) == expected
    routed = any("expert" in module for module in modules)
    assert any(map(families.is_router, modules)) == routed


@pytest.mark.parametrize("name", FAMILIES)
def test_number_of_experts_of_every_family(name: str) -> None:
    routed = any("experts" in module for module in module_names(FAMILIES[name]))
    assert num_experts(FAMILIES[name].full_config()) == (EXPERTS if routed else 0)


def test_heads_that_rows_are_made_of() -> None:
    assert families.heads_field("model.layers.0.self_attn.kv_b_proj") == "num_attention_heads"
    assert families.heads_field("model.layers.0.self_attn.v_proj") == "num_key_value_heads"
    assert families.heads_field("model.layers.0.mlp.up_proj") is None


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
def test_layers_that_predict_further_tokens_are_left_aside(name: str) -> None:
    family = FAMILIES[name]
    extra = {tensor.removesuffix(".weight") for tensor in family.extra}
    assert never_loaded([*module_names(family), *extra], family.full_config()) == extra != set()


def test_a_language_model_that_is_part_of_a_larger_one() -> None:
    family, head = FAMILIES["llama4"], "language_model.lm_head"
    modules = dict.fromkeys([*module_names(family), "language_model.model.embed_tokens", head])
    vision = {"vision_model.layernorm_pre", "multi_modal_projector.linear_1", "language_model.model.layers.2.mlp.gate"}
    assert never_loaded([*modules, *vision], family.full_config()) == vision
    assert norm_readers("language_model.model.norm", modules) == [head]
    assert [families.model_order(name) for name in ("language_model.model.embed_tokens", head)] == [0, 3]
    query = "language_model.model.layers.0.self_attn.q_proj"
    assert families.is_reordered(query, family.full_config())
    assert not families.is_reordered(query, FAMILIES["llama"].full_config())
