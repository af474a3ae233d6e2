"""INT8 weights that their file keeps as octets of 32-bit words: symmetric 8 bits of GPTQ and of compressed-tensors.

At rest: int8 [out, in], the octets without their offset of 128; scales [out, groups] in the file's dtype; for act-order
the permutation that sorts columns by their group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from ..formats import ModuleFormat
from ..formats.base import TORCH_DTYPES
from .base import Conversion, Layout, Tensors, owned
from .compiled import available
from .implied import implied, without_implied
from .int8 import MAX_COLUMNS, integers_are_exact, multiply
from .native import turn_words
from .permutation import inverse, sorting


class _Names(NamedTuple):
    """Local names of a format's tensors, and whether they lie [in, out] rather than [out, in]."""

    words: str
    scales: str
    g_idx: str
    turned: bool


#: 128 in each octet.
OFFSETS = 0x80808080
NAMES = {
    "gptq": _Names("qweight", "scales", "g_idx", True),
    "packed": _Names("weight_packed", "weight_scale", "weight_g_idx", False),
}


class Int8Words:
    """W8A16 like `int8`, of words."""

    name = "int8_words"
    takes_bias = False

    def takes(self, format: ModuleFormat) -> bool:
        """Symmetric 8 bits, with act-order only in whole groups."""
        p, columns = format.parameters, format.shape[-1]
        if format.name not in NAMES or p.bits != 8 or not p.symmetric or p.num_groups or columns >= MAX_COLUMNS:
            return False
        return integers_are_exact() and not (p.act_order and columns % p.group_size)

    def layout(self, format: ModuleFormat) -> Layout:
        """`weight` and `scales`, then `permutation` where the format has act-order."""
        p, (rows, columns) = format.parameters, format.shape
        is_one = getattr(p, "strategy", None) == "tensor"
        layout: Layout = {
            "weight": (torch.int8, (rows, columns)),
            "scales": (TORCH_DTYPES[p.scale_dtype], (1,) if is_one else (rows, -(-columns // p.group_size))),
        }
        return {**layout, "permutation": (torch.int32, (columns,))} if p.act_order else layout

    def converts(self, format: ModuleFormat) -> Conversion | None:
        """The words to octets, where no act-order decides their places."""
        return None if format.parameters.act_order else Conversion(NAMES[format.name].words, "weight", 1, _convert)

    def pack(self, tensors: Mapping[str, torch.Tensor], format: ModuleFormat) -> Tensors:
        """Words to octets; what the parameters imply is checked, then left out."""
        kept, names = without_implied(tensors, format), NAMES[format.name]
        weight = kept.get("weight")
        if weight is None:
            weight = _flipped(kept[names.words], names).view(torch.int8)
        resident = {"weight": weight, "scales": owned(_turned(kept[names.scales], names))}
        if format.parameters.act_order:
            resident["permutation"] = sorting(kept[names.g_idx], format.parameters.group_size, names.g_idx)
            resident["weight"] = resident["weight"].index_select(1, resident["permutation"])
        return resident

    def unpack(self, resident: Mapping[str, torch.Tensor], format: ModuleFormat) -> Tensors:
        """Octets back to words; what was left out is rebuilt from the parameters."""
        weight, names, tensors = resident["weight"], NAMES[format.name], dict(implied(format))
        if format.parameters.act_order:
            place = inverse(resident["permutation"])
            weight = weight.index_select(1, place)
            tensors[names.g_idx] = place // format.parameters.group_size
        tensors[names.words] = _flipped(weight.view(torch.int32), names)
        tensors[names.scales] = _turned(resident["scales"], names)
        return tensors

    def linear(self, x: torch.Tensor, resident: Mapping[str, torch.Tensor], format: ModuleFormat) -> torch.Tensor:
        """As `int8` does, scales by group."""
        if "permutation" in resident:
            x = x.index_select(1, resident["permutation"])
        return multiply(x, resident["weight"], resident["scales"], format.parameters.group_size)


def _convert(words: torch.Tensor, format: ModuleFormat, octets: torch.Tensor) -> None:
    _flip(words, NAMES[format.name], octets.view(torch.int32))


def _turned(tensor: torch.Tensor, names: _Names) -> torch.Tensor:
    return tensor.t().contiguous() if names.turned else tensor.contiguous()


def _flipped(words: torch.Tensor, names: _Names) -> torch.Tensor:
    """int32 words turned, and the sign bit of each of their octets: to and from an offset of 128."""
    flipped = torch.empty(words.shape[::-1] if names.turned else words.shape, dtype=torch.int32)
    _flip(words, names, flipped)
    return flipped


def _flip(words: torch.Tensor, names: _Names, flipped: torch.Tensor) -> None:
    if names.turned and available():
        turn_words(words.contiguous(), OFFSETS, flipped)
    else:
        torch.bitwise_xor(words.t() if names.turned else words, OFFSETS - (1 << 32), out=flipped)
