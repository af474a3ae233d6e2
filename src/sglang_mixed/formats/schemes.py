"""What a `quantization_config` claims of weights, for the formats whose tensors do not tell it themselves.

Read: `fp8` (DeepSeek, Qwen, AutoRound; GPTQModel adds weight_scale_semantics), `compressed-tensors` (config_groups),
`modelopt` (quant_algo), `auto-round` (bits, data_type), `fbgemm_fp8` (Meta), `w8a8_fp8` and `w8a8_int8` (SGLang).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Scheme:
    """One claim; None means that the config does not say."""

    kind: str  # "float8", "int8"; others ("int4") only ever contradict
    granularity: str | None = None  # "tensor" | "channel" | "block" | any other strategy
    block: tuple[int, int] | None = None
    activations: str | None = None  # "dynamic" | "static" | "none" (weight only)
    inverse: bool = False
    group_size: int | None = None  # of granularity "group"
    symmetric: bool = True
    act_order: bool = False


def schemes(config: Mapping[str, Any]) -> tuple[Scheme, ...] | None:
    """Every claim of one module's config; None where it says nothing we know."""
    read = _READERS.get(str(config.get("quant_method", "")).lower())
    return read(config) if read else None


def _pair(value: Any) -> tuple[int, int] | None:
    whole = isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(n, int) and n > 0 for n in value)
    return (value[0], value[1]) if whole else None


def _fp8(config: Mapping[str, Any]) -> tuple[Scheme, ...]:
    block = _pair(config.get("weight_block_size"))
    named = {"row": "channel", "tensor": "tensor"}.get(str(config.get("weight_scale_method")))
    semantics = config.get("weight_scale_semantics")
    # Only GPTQModel writes the semantics, and its FP8 is weight only.
    activations = config.get("activation_scheme", "none" if semantics else "dynamic")
    return (Scheme("float8", "block" if block else named, block, activations, semantics == "inverse"),)


def _compressed_tensors(config: Mapping[str, Any]) -> tuple[Scheme, ...]:
    return tuple(_group(group) for group in (config.get("config_groups") or {}).values() if group.get("weights"))


def _group(group: Mapping[str, Any]) -> Scheme:
    weights, inputs = group["weights"], group.get("input_activations")
    kind, size = f"{weights.get('type', 'int')}{weights.get('num_bits', 8)}", weights.get("group_size")
    # The library itself infers a strategy that is not said.
    inferred = "tensor" if size is None else "channel" if size == -1 else "group"
    granularity, block = weights.get("strategy") or inferred, _pair(weights.get("block_structure"))
    if kind == "float8" and granularity == "group":
        granularity, block = "block", _pair([1, size or 0])
    return Scheme(
        kind,
        granularity,
        block,
        "none" if not inputs else "dynamic" if inputs.get("dynamic") else "static",
        group_size=size,
        symmetric=bool(weights.get("symmetric", True)),
        act_order=weights.get("actorder") in ("group", "dynamic", True),
    )


def _modelopt(config: Mapping[str, Any]) -> tuple[Scheme, ...]:
    # MIXED_PRECISION names the algorithm of each layer; the layers go by engines' names, so the tensors decide.
    layers = (config.get("quantized_layers") or {}).values()
    named = [layer.get("quant_algo") for layer in layers] or [config.get("quant_algo")]
    return tuple(dict.fromkeys(_algorithm(str(name or "unnamed").upper()) for name in named))


def _algorithm(name: str) -> Scheme:
    return _ALGORITHMS.get(name) or Scheme("float4" if "FP4" in name else name.lower())


#: ModelOpt's names of 8-bit algorithms; all that hold FP4 name it.
_ALGORITHMS = {
    "FP8": Scheme("float8"),
    "FP8_PER_CHANNEL_PER_TOKEN": Scheme("float8", "channel", activations="dynamic"),
    "FP8_PB_WO": Scheme("float8", "block", (128, 128), "none"),
    "FP8_BLOCK_SCALES": Scheme("float8", "block", (128, 128), "dynamic"),
    "MXFP8": Scheme("float8", "block", (1, 32), "dynamic"),
}


def _auto_round(config: Mapping[str, Any]) -> tuple[Scheme, ...]:
    floating = "fp" in str(config.get("data_type", "int"))
    group = config.get("group_size")
    block = _pair(config.get("weight_block_size")) or _pair(group)
    if floating and isinstance(group, int) and group > 0:
        block = (1, group)
    granularity = "block" if block else {-1: "channel", 0: "tensor"}.get(group if isinstance(group, int) else 1)
    quantized = int(config.get("act_bits") or 16) <= 8
    activations = "none" if not quantized else "dynamic" if config.get("act_dynamic", True) else "static"
    kind = f"{'float' if floating else 'int'}{config.get('bits', 8)}"
    return (Scheme(kind, granularity, block, activations),)


_READERS: dict[str, Callable[[Mapping[str, Any]], tuple[Scheme, ...]]] = {
    "fp8": _fp8,
    "mxfp8": lambda config: (Scheme("float8", "block", (1, 32), "dynamic"),),
    "compressed-tensors": _compressed_tensors,
    "modelopt": _modelopt,
    "modelopt_fp8": _modelopt,
    "modelopt_fp4": _modelopt,
    "modelopt_mixed": _modelopt,
    "auto-round": _auto_round,
    "fbgemm_fp8": lambda config: (Scheme("float8", "channel", activations="dynamic"),),
    "w8a8_fp8": lambda config: (Scheme("float8", activations="dynamic"),),
    "w8a8_int8": lambda config: (Scheme("int8", activations="dynamic"),),
    "gptq": lambda config: (Scheme(f"int{config.get('bits', 4)} GPTQ"),),
    "awq": lambda config: (Scheme(f"int{config.get('bits', 4)} AWQ"),),
}
