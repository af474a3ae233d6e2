// Hue tells a cell's format, lightness its tokens: the ramps (OKLCH, computed here) are equally light at equal steps.
// The first hues are those that color blindness confuses least; letters say the same.

const HUES = [250, 55, 165, 345, 300, 205, 100];

/** A, B, ... Z, A2, ... */
const formatLetter = (number) =>
  String.fromCharCode(65 + (number % 26)) + (number < 26 ? "" : String(Math.floor(number / 26) + 1));

/** OKLCH (hue in degrees) to linear sRGB, which may lie outside of 0 to 1. */
function linearRgb(lightness, chroma, hue) {
  const a = chroma * Math.cos((hue * Math.PI) / 180);
  const b = chroma * Math.sin((hue * Math.PI) / 180);
  const l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (lightness - 0.0894841775 * a - 1.291485548 * b) ** 3;
  return [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ];
}

/** The CSS color of this lightness and hue, with as much of the chroma as sRGB has there. */
function oklch(lightness, chroma, hue) {
  let linear = linearRgb(lightness, chroma, hue);
  while (chroma > 0 && linear.some((value) => value < 0 || value > 1)) {
    chroma = Math.max(0, chroma - 0.005);
    linear = linearRgb(lightness, chroma, hue);
  }
  const encode = (value) => Math.round(255 * (value <= 0.0031308 ? 12.92 * value : 1.055 * value ** (1 / 2.4) - 0.055));
  return `rgb(${linear.map(encode).join(" ")})`;
}

const ramps = new Map();

/** 64 colors of one format, or of none (-1), from no tokens (near the background) to the most. */
function ramp(format, dark = isDark()) {
  const name = `${format} ${dark}`;
  if (!ramps.has(name)) ramps.set(name, makeRamp(HUES[format] ?? null, dark));
  return ramps.get(name);
}

function makeRamp(hue, dark) {
  return Array.from({ length: 64 }, (_, step) => {
    const t = step / 63;
    const chroma = hue === null ? 0 : 0.045 + 0.105 * Math.sin((Math.PI * Math.min(1, 1.4 * t)) / 2);
    return oklch(dark ? 0.3 + 0.58 * t : 0.94 - 0.58 * t, chroma, hue ?? 0);
  });
}

/** A gradient over a format's ramp, for CSS. */
const gradient = (format) => `linear-gradient(90deg, ${[0, 21, 42, 63].map((step) => ramp(format)[step]).join(", ")})`;

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

const cssColor = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
