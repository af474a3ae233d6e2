"""The config of an exported mix: every module by the rules of its own source, and no module by none or two."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from sglang_mixed.errors import FormatError
from sglang_mixed.formats import Detector, TensorInfo
from sglang_mixed.formats.mix import MixRules, mix_config

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {"-:.*o_proj": {}}}
MODULES = ["layers.0.q_proj", "layers.0.o_proj", "layers.1.q_proj"]
MIX = mix_config({"four": (["layers.0.*"], GPTQ), "sixteen": (["layers.1.q_proj"], {})})
PACKED = {
    "qweight": TensorInfo("I32", (8, 64)),
    "qzeros": TensorInfo("I32", (2, 8)),
    "scales": TensorInfo("F16", (2, 64)),
}


def test_modules_follow_the_config_of_their_source() -> None:
    detector = Detector(MIX, MODULES)
    assert detector("layers.0.q_proj", PACKED).name == "gptq"
    assert detector("layers.1.q_proj", {"weight": TensorInfo("BF16", (64, 64))}).name == "plain"
    assert detector.rules.origin("layers.0.o_proj") == ("four", GPTQ)


def test_an_exception_of_one_source_is_no_other_ones() -> None:
    with pytest.raises(FormatError, match="not quantized; its tensors are gptq"):
        Detector(MIX, MODULES)("layers.0.o_proj", PACKED)
    moved = mix_config({"four": (["layers.*.q_proj"], GPTQ), "other": (["**.o_proj"], {**GPTQ, "dynamic": {}})})
    assert Detector(moved, MODULES)("layers.0.o_proj", PACKED).name == "gptq"


def changed(*path: str, value: Any) -> dict[str, Any]:
    config = copy.deepcopy(MIX)
    place: Any = config
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (changed("version", value=2), "version 2, and this program reads 1"),
        (changed("sources", value={}), "names no sources"),
        (changed("sources", "four", value=[]), "'four' lacks its modules"),
        (changed("sources", "four", "quantization_config", value=None), "'four' lacks"),
        (changed("sources", "four", "quantization_config", value=MIX), "is a mix itself"),
        (changed("sources", "sixteen", "modules", value=["layers.*.q_proj"]), "in the lists of four and sixteen"),
        (changed("sources", "sixteen", "modules", value=[]), r"layers\.1\.q_proj is in no source's list"),
        (changed("sources", "sixteen", "modules", value=["layers.9.*"]), r"'layers\.9\.\*' of sixteen names no module"),
        (changed("sources", "sixteen", "modules", value=["a..b"]), "sixteen: malformed pattern"),
        (changed("sources", "sixteen", "modules", value=[7]), "names no module"),
    ],
)
def test_a_config_that_does_not_tell_each_module_once_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        MixRules(config, MODULES)
