"""What a weight format is: how a module's tensors are recognised, shaped, cut and decoded.

A *module* is everything in a checkpoint below one dotted prefix, e.g. `model.layers.0.self_attn.q_proj`; its
*local names* are what follows the prefix (`weight`, `qweight`, `scales`, `bias`, ...). Formats know nothing of
files, maps or engines: they see local names, dtypes, shapes and the checkpoint's own quantization config.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from ..errors import InconsistentFormatError

#: safetensors dtype code -> torch dtype; the only dtypes a source may hold.
TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
ITEM_BYTES: dict[str, int] = {code: dtype.itemsize for code, dtype in TORCH_DTYPES.items()}
#: The dtypes of scales and biases.
FLOAT_DTYPES = ("BF16", "F16", "F32")
#: Scales of a quantized key-value cache, which some exports put beside the weights of an attention layer: no part of
#: any weight.
CACHE_SCALES = frozenset(("k_scale", "v_scale", "q_scale", "kv_scale", "prob_scale", "output_scale"))
#: Of a cache that is quantized about an offset (ModelOpt); only beside one of the scales, alone these are biases.
CACHE_OFFSETS = frozenset(("k_bias", "v_bias"))
COPY_AGAIN = "download or export the checkpoint again, or map this module to another source"

Shape = tuple[int, ...]


class TensorInfo(NamedTuple):
    """What a safetensors header says of one tensor: dtype code and shape."""

    dtype: str
    shape: Shape


@dataclass(frozen=True, slots=True)
class Axis:
    """One dimension of a stored tensor: every `entries` indices of it hold `values` rows ("out") or columns ("in").

    A dimension that follows neither (a per-tensor scale's) has role None. Examples: GPTQ 4-bit `qweight`
    [in/8, out] is (Axis("in", 8), Axis("out")); 3-bit packs 32 values in 3 words, Axis("in", 32, 3);
    a 128x128 block scale is (Axis("out", 128), Axis("in", 128)).
    """

    role: str | None
    values: int = 1
    entries: int = 1

    def length(self, size: int) -> int:
        """Number of indices that hold `size` weight rows or columns (a last partial unit counts whole)."""
        return math.ceil(size / self.values) * self.entries


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor a module must consist of: dtype code (or several allowed ones, the usual first), shape, axes."""

    dtypes: tuple[str, ...]
    shape: Shape
    axes: tuple[Axis, ...]
    optional: bool = False


class FormatParameters(Protocol):
    """A frozen dataclass of plain values (int, bool, str, None): the parameters of one format for one module."""

    __dataclass_fields__: Any


@dataclass(frozen=True, slots=True)
class ModuleFormat:
    """A module's detected format: registry name, parameters, and the weight's logical shape [out, in].

    Plain modules may have any rank. Hashable and JSON-able (see `formats.to_json`).
    """

    name: str
    parameters: Any
    shape: Shape


class WeightFormat(Protocol):
    """One storage format. Implementations are stateless, one per file, registered in `formats/__init__`."""

    name: str
    parameters_type: type

    def detect(self, module: str, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> ModuleFormat | None:
        """This format's parameters if the module's local tensors are of it, else None.

        `config` is what the checkpoint's `quantization_config` says of this one module (see `rules.Rules`; empty for
        no config). Raises InconsistentFormatError where config and tensors contradict each other.
        """
        ...

    def tensors(self, parameters: Any, shape: Shape) -> dict[str, TensorSpec]:
        """Local name -> what it must be, for a weight of logical shape [out, in].

        Every name but `bias` has exactly one dtype; the only optional one is a quantized module's `bias`.
        """
        ...

    def dequantize(self, tensors: Mapping[str, torch.Tensor], parameters: Any, dtype: torch.dtype) -> torch.Tensor:
        """The reference: weight [out, in] of a whole module, computed in float32 (exact), then cast to `dtype`."""
        ...

    def label(self, parameters: Any) -> str:
        """Short human name, e.g. `GPTQ int4 g128`, `FP8 128x128`, `BF16`."""
        ...


def weight_tensors(tensors: Mapping[str, TensorInfo]) -> Mapping[str, TensorInfo]:
    """A module's tensors without the scales of a key-value cache; all of them where there is nothing else."""
    if CACHE_SCALES.isdisjoint(tensors):
        return tensors
    of_cache = CACHE_SCALES | CACHE_OFFSETS
    return {name: info for name, info in tensors.items() if name not in of_cache} or tensors


def tensor_bytes(info: TensorInfo) -> int:
    """Bytes of one stored tensor."""
    return math.prod(info.shape) * ITEM_BYTES[info.dtype]


def bias_spec(rows: int) -> TensorSpec:
    """The bias a quantized module may have: [out], in any float dtype."""
    return TensorSpec(FLOAT_DTYPES, (rows,), (Axis("out"),), optional=True)


def check_tensors(module: str, tensors: Mapping[str, TensorInfo], specs: Mapping[str, TensorSpec], label: str) -> None:
    """Raise InconsistentFormatError unless the local tensors are exactly those of `specs` (optional ones may lack)."""
    for name in sorted(tensors.keys() | specs.keys()):
        spec, info = specs.get(name), tensors.get(name)
        if spec is None:
            problem, rule = "this tensor has no place in its module's format", f"{label} consists of {', '.join(specs)}"
        elif info is None:
            if spec.optional:
                continue
            problem, rule = "a tensor of this module is missing", f"{label} consists of {', '.join(specs)}"
        elif info.dtype not in spec.dtypes:
            problem, rule = f"dtype {info.dtype} is not possible here", f"{label} has it in {' or '.join(spec.dtypes)}"
        elif tuple(info.shape) != spec.shape:
            problem, rule = f"shape {list(info.shape)} is not possible here", f"{label} has it in {list(spec.shape)}"
        else:
            continue
        raise InconsistentFormatError(problem, tensor=f"{module}.{name}", rule=rule, remedy=COPY_AGAIN)
