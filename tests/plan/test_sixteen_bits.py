"""What the engine reads in 16 bits cannot come compressed from a source."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_mixed.errors import UnsupportedError

from ..models import Tensors, linear, write
from .conftest import Mapped

LAYER = "model.layers.0"


def quantize(module: str) -> object:
    def change(tensors: Tensors) -> None:
        tensors.update(linear("fp8", module, tensors.pop(f"{module}.weight").float()))

    return change


@pytest.mark.parametrize("module", [f"{LAYER}.mlp.gate", "lm_head"])
def test_a_quantized_router_or_head_is_refused_with_the_line_to_add(
    module: str, tmp_path: Path, mapped: Mapped
) -> None:
    fp8 = write(tmp_path / "whole", "fp8", change=quantize(module))
    with pytest.raises(UnsupportedError, match="FP8") as caught:
        mapped({"model.norm": "bf16"}, default="fp8", fp8=fp8)
    assert caught.value.tensor == module
    assert caught.value.remedy == f'add to weight_mapping:\n    "{module}": bf16'
    assert mapped({module: "bf16"}, default="fp8", fp8=fp8).modules[module].format.name == "plain"


def test_where_no_source_holds_it_in_16_bits_no_line_is_proposed(tmp_path: Path, mapped: Mapped) -> None:
    fp8 = write(tmp_path / "whole", "fp8", change=quantize("lm_head"))
    with pytest.raises(UnsupportedError, match="lm_head") as caught:
        mapped({}, fp8=fp8, bf16=None, gptq=None, gptq64=None)
    assert caught.value.remedy == "map it to a source that holds it in BF16 or FP16"
