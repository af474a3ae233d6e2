"""Rules by module name, and that a large checkpoint costs what its kinds of modules cost."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import packers
import pytest

from sglang_mixed.errors import FormatError
from sglang_mixed.formats import Detector, TensorInfo
from sglang_mixed.formats.rules import Rules

RNG = np.random.default_rng(3)


def gptq_config(dynamic: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False, "dynamic": dynamic}


def bits(config: dict[str, Any], module: str) -> Any:
    rules = Rules(config)
    found = rules.configs[rules.index(module)]
    return None if found is None else found["bits"]


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("model.layers.0.mlp.up_proj", 8),  # the first match wins
        ("model.layers.1.mlp.up_proj", 2),
        ("model.layers.1.mlp.gate", None),  # exclusions come first wherever they stand
        ("model.layers.2.self_attn.q_proj", 4),
        ("vision.model.layers.0.mlp.up_proj", 4),  # patterns match from the start
    ],
)
def test_dynamic_rules(module: str, expected: int | None) -> None:
    rules = {r"+:model\.layers\.0\.": {"bits": 8}, r"model\.layers\..*mlp": {"bits": 2}, r"-:.*\.gate$": {}}
    assert bits(gptq_config(rules), module) == expected


def test_dynamic_rules_with_groups_and_flags() -> None:
    rules = {r"(?i)MODEL\.(a|b)\.\1": {"bits": 8}, r"model\.(c)": {"bits": 2}}
    assert [bits(gptq_config(rules), name) for name in ("model.a.a", "model.a.b", "model.c")] == [8, 4, 2]


def test_a_broken_rule_is_refused() -> None:
    with pytest.raises(FormatError, match=r"'\[', which is not a regular expression"):
        Detector(gptq_config({"[": {"bits": 8}}))


@pytest.mark.parametrize(
    "wrong",
    [
        {"bits": "4"},
        {"dynamic": {"a": 4}},
        {"dynamic": []},
        {"ignore": "lm_head"},
        {"config_groups": {"g": {"weights": 8}}},
    ],
)
def test_a_malformed_config_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match="quantization_config is malformed"):
        Detector({"quant_method": "compressed-tensors", **wrong})


def test_overrides_reach_detection() -> None:
    detector = Detector(
        gptq_config({r"+:b$": {"bits": 8, "group_size": -1}, r"+:c$": {"sym": False, "desc_act": True}})
    )
    b = packers.gptq(RNG, 32, 64, bits=8, group=-1)
    c = packers.gptq(RNG, 32, 64, sym=False, order="act")
    assert (detector("b", b.infos).parameters.bits, detector("b", b.infos).parameters.group_size) == (8, 64)
    assert (detector("c", c.infos).parameters.symmetric, detector("c", c.infos).parameters.act_order) == (False, True)
    assert detector("a", packers.gptq(RNG, 32, 64).infos).parameters.bits == 4
    assert detector("d", {"weight": TensorInfo("BF16", (4, 4))}).name == "plain"


def test_autoround_exceptions() -> None:
    extra = {"model.a": {"bits": 8}, r".*gate.*": {"bits": 16, "data_type": "fp"}}
    config = {"quant_method": "auto-round", "bits": 4, "extra_config": extra}
    assert [bits(config, name) for name in ("model.a", "model.ab", "model.gate")] == [8, 4, None]


def test_compressed_tensors_groups_are_chosen_by_name_then_class() -> None:
    def group(targets: list[str], strategy: str) -> dict[str, Any]:
        return {"targets": targets, "weights": {"num_bits": 8, "type": "float", "strategy": strategy}}

    groups = {"a": group(["Linear"], "channel"), "b": group(["re:.*q_proj$", "exact.name"], "tensor")}
    config = {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": ["lm_head", "re:.*gate$"]}
    rules = Rules(config)

    def chosen(module: str) -> list[str] | None:
        found = rules.configs[rules.index(module)]
        return None if found is None else list(found["config_groups"])

    names = ("m.0.q_proj", "exact.name", "m.0.k_proj", "lm_head", "m.mlp.gate", "m.lm_head")
    assert [chosen(name) for name in names] == [["b"], ["b"], ["a"], None, None, ["a"]]


def test_alike_modules_share_one_format() -> None:
    detector = Detector({})
    infos = {"weight": TensorInfo("BF16", (4, 4))}
    assert detector("a", infos) is detector("b", dict(infos))
    assert detector("a", {"weight": TensorInfo("BF16", (4, 5))}) is not detector("a", infos)


def test_forty_thousand_modules_are_quick() -> None:
    dynamic = {rf"-:.*model\.layers\.{layer}\.mlp\.gate.*": {} for layer in range(4)}
    expert = packers.gptq(RNG, 32, 64).infos
    names = [f"model.layers.{layer}.mlp.experts.{e}.up_proj" for layer in range(94) for e in range(426)]
    modules = {name: dict(expert) for name in names}
    detector = Detector(gptq_config(dynamic))
    begin = time.perf_counter()
    found = {detector(name, tensors) for name, tensors in modules.items()}
    elapsed = time.perf_counter() - begin
    assert len(found) == 1
    assert elapsed < 1.0  # 0.1 s on an idle machine; the bound only catches work done per module
