"""Bytes of planned modules: in memory, in the file, in 16 bits, and on one of several ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import ParallelismError
from ..formats import ModuleFormat, get_format, nbytes
from ..formats.base import ITEM_BYTES
from .families import cut_role, expert_of, is_key_value, num_experts, text_config


def resident(module_format: ModuleFormat) -> int:
    """Bytes that the kernel of this format keeps, without a bias."""
    from ..kernels import resident_bytes

    return resident_bytes(module_format)


def stored(module_format: ModuleFormat) -> int:
    """Bytes in the file, without a bias."""
    return nbytes(module_format)


def in_16_bits(module_format: ModuleFormat) -> int:
    """Bytes of the weight at two a value; a plain module's other tensors (but its bias) count likewise."""
    values = math.prod(module_format.shape)
    if module_format.name == "plain":
        values += sum(math.prod(shape) for name, _, shape in module_format.parameters.others if name != "bias")
    return 2 * values


def item_bytes(dtype: str | None) -> int:
    """Bytes of one value of a safetensors dtype."""
    return ITEM_BYTES[dtype] if dtype else 0


@dataclass(frozen=True)
class Cut:
    """`tp` tensor-parallel ranks, `ep` of them sharing out the experts (as SGLang: tp / ep ranks cut each expert)."""

    tp: int
    ep: int
    config: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.tp < 1 or self.ep < 1 or self.tp % self.ep:
            raise ParallelismError(
                f"tp {self.tp} with ep {self.ep}", rule="ep divides tp", remedy="change --tp or --ep"
            )

    def largest_rank(self, modules: Iterable[tuple[str, ModuleFormat, str | None]]) -> int:
        """Bytes of the rank that holds most, of (name, format, dtype of the bias) each; experts lie in equal runs."""
        experts = num_experts(self.config)
        if experts % self.ep:
            raise ParallelismError(f"{experts} experts on {self.ep} ranks", rule="ep divides the experts")
        shared, of_ranks = 0, [0] * self.ep
        known: dict[tuple[str, int, str | None, bool], int] = {}
        for name, module_format, bias in modules:
            parent, _, last = name.rpartition(".")
            expert = expert_of(parent)
            key = last, id(module_format), bias, expert is None
            nbytes = known.get(key)
            if nbytes is None:
                ways = self.tp if expert is None else self.tp // self.ep
                nbytes = known[key] = self._module_bytes(name, module_format, bias, ways)
            if expert is None:
                shared += nbytes
            else:
                of_ranks[expert[1] * self.ep // max(experts, 1)] += nbytes
        return shared + max(of_ranks)

    def _module_bytes(self, name: str, module_format: ModuleFormat, bias: str | None, ways: int) -> int:
        if is_key_value(name):
            ways = min(ways, int(text_config(self.config).get("num_key_value_heads") or ways))
        part = self._cut(name, module_format, cut_role(name), ways)
        return resident(part) + (part.shape[0] * item_bytes(bias) if bias else 0)

    def _cut(self, name: str, module_format: ModuleFormat, role: str | None, ways: int) -> ModuleFormat:
        shape = module_format.shape
        if role is None or ways == 1 or len(shape) != 2:
            return module_format
        axis = 0 if role == "out" else 1
        whole, rest = divmod(shape[axis], ways)
        specs = get_format(module_format.name).tensors(module_format.parameters, shape)
        units = {one.values for spec in specs.values() for one in spec.axes if one.role == role}
        uneven = [unit for unit in units if unit < shape[axis] and whole % unit]
        if rest or uneven:
            unit = f" in units of {max(uneven)}" if uneven else ""
            raise ParallelismError(
                f"{shape[axis]} {'rows' if role == 'out' else 'columns'}{unit} cannot be cut in {ways}",
                tensor=name,
                rule=f"each rank's part of {get_format(module_format.name).label(module_format.parameters)} is whole",
                remedy="choose another --tp or --ep, or map the module to a source with smaller blocks or groups",
            )
        return replace(module_format, shape=(whole, shape[1]) if role == "out" else (shape[0], whole))
