from __future__ import annotations

import io
import sys
from collections.abc import Mapping

import numpy as np
import pytest
from PIL import Image

from sglang_mixed.errors import ExpertExportError
from sglang_mixed.experts import ExpertExport, ExpertFormats
from sglang_mixed.experts.colors import HUES, letter, ramp
from sglang_mixed.experts.picture import draw

from .synthetic import counts

MEMORY: Mapping[str, Mapping[str, Mapping[str, int]]] = {
    "by_format": {"FP8": {"bytes": 2**20, "bf16_bytes": 2**21}, "BF16": {"bytes": 7, "bf16_bytes": 7}},
    "by_module_kind": {"experts": {"bytes": 2**20, "bf16_bytes": 2**21}},
}


def colors_in(png: bytes) -> set[int]:
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(np.int64)
    return set(np.unique(pixels @ [65536, 256, 1]).tolist())


def shade(format: int, step: int) -> int:
    return int(np.floor(ramp(format)[step] * 255 + 1e-9) @ [65536, 256, 1])


@pytest.mark.parametrize(("layers", "experts"), [(1, 4), (94, 128)])
def test_each_cell_has_the_hue_of_its_format_and_the_hottest_the_full_color(layers: int, experts: int) -> None:
    one = counts(layers=tuple(range(layers)), experts=experts, tokens=64)
    formats = ExpertFormats(("FP8", "INT4"), (np.arange(experts) % 2)[None].repeat(layers, axis=0))
    found = colors_in(draw(ExpertExport.of_counts(one, formats), MEMORY))
    expert = one.total.argmax() % experts
    assert shade(expert % 2, 63) in found
    assert shade(1 - expert % 2, 63) not in found


def test_an_export_without_formats_is_drawn_in_gray_and_one_without_experts_not_at_all() -> None:
    assert shade(-1, 63) in colors_in(draw(ExpertExport(ExpertExport.of_counts(counts()).experts)))
    with pytest.raises(ExpertExportError, match="no expert to draw"):
        draw(ExpertExport(()))


def test_equal_steps_of_two_ramps_are_equally_light_and_stay_in_the_screens_colors() -> None:
    for dark in (False, True):
        ramps = np.stack([ramp(number, dark) for number in range(-1, len(HUES))])
        assert ramps.min() >= 0 and ramps.max() <= 1
        linear = np.where(ramps <= 0.04045, ramps / 12.92, ((ramps + 0.055) / 1.055) ** 2.4)
        luminance = linear @ [0.2126, 0.7152, 0.0722]
        assert (np.abs(np.diff(luminance, axis=1)) > 0).all()
        assert np.ptp(np.cbrt(luminance), axis=0).max() < 0.08


def test_letters_tell_any_number_of_formats_apart() -> None:
    assert [letter(0), letter(25), letter(26)] == ["A", "Z", "A2"]
    assert len({letter(number) for number in range(100)}) == 100


def test_without_matplotlib_the_error_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(ExpertExportError) as caught:
        draw(ExpertExport.of_counts(counts()))
    assert caught.value.remedy and "pip install 'sglang-mixed[pictures]'" in caught.value.remedy
