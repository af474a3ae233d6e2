"""The colors of the page, for pictures: hue tells an expert's format, lightness its tokens.

Ramps are equally light at equal steps (OKLCH: Ottosson, "A perceptual color space for image processing", 2020);
`page/colors.js` computes the same ones.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.typing import NDArray

STEPS = 64
#: The first hues are those that color blindness confuses least; the rest of the formats is gray.
HUES = (250, 55, 165, 345, 300, 205, 100)

Floats = NDArray[np.float64]
_TO_LMS = np.array(
    [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.291485548]]
)
_TO_LINEAR_RGB = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.707614701],
    ]
)


@functools.cache
def ramp(format: int, dark: bool = False) -> Floats:
    """sRGB float64 [64, 3] of a format's number (-1 for none): from no tokens, near the background, to the most."""
    hue = HUES[format] if 0 <= format < len(HUES) else None
    colors = []
    for t in np.linspace(0, 1, STEPS):
        chroma = 0.0 if hue is None else 0.045 + 0.105 * math.sin(math.pi * min(1, 1.4 * t) / 2)
        colors.append(_oklch(0.3 + 0.58 * t if dark else 0.94 - 0.58 * t, chroma, hue or 0))
    return np.array(colors)


def letter(format: int) -> str:
    """A, B, ... Z, A2, ...: what tells formats apart without color."""
    return chr(65 + format % 26) + ("" if format < 26 else str(format // 26 + 1))


def _oklch(lightness: float, chroma: float, hue: float) -> Floats:
    """The color of this lightness and hue (degrees), with as much of the chroma as sRGB has there."""
    angle = math.radians(hue)
    while True:
        lab = np.array([lightness, chroma * math.cos(angle), chroma * math.sin(angle)])
        linear = _TO_LINEAR_RGB @ (_TO_LMS @ lab) ** 3
        if chroma <= 0 or (linear.min() >= 0 and linear.max() <= 1):
            break
        chroma = max(0.0, chroma - 0.005)
    linear = linear.clip(0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
