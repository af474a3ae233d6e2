"""How the Triton kernels read one weight: what its format, its shape and a rank's share of it come to."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ...formats import ModuleFormat
from ...formats.mxfp4 import GROUP_SIZE as MXFP4_COLUMNS
from ...formats.nvfp4 import GROUP_SIZE as NVFP4_COLUMNS
from ...formats.slicing import Region, whole

#: What is stored: the activations' own dtype, e4m3, int8, unsigned integers, e2m1.
PLAIN, FP8, INT8, CODES, E2M1 = range(5)
#: Columns of one step of a product: tensor cores multiply at least 16, more than 128 only take registers.
SMALLEST_STEP, LARGEST_STEP = 16, 128
#: As a group or block: one scale for all of them.
ALL = 1 << 30


@dataclass(frozen=True, slots=True, order=True)
class Codec:
    """All about a weight but where it lies, known when Triton compiles: the kernels have one branch a codec.

    The stored matrix is `rows` x `columns`, filled up to `width` columns. Scales and zero points are [column groups,
    row groups]: `group` columns and `block` rows share one.
    """

    kind: int
    bits: int = 16
    group: int = ALL
    block: int = ALL
    #: torch's name of the scales' dtype, "" for none; exponents are "float8_e8m0fnu".
    scale: str = ""
    divides: bool = False
    #: Bits of a stored zero point, which counts `zero_offset` more; 0: all are in the middle of the codes.
    zero_bits: int = 0
    zero_offset: int = 0
    #: The scale of the whole weight: "", "multiplies" or "divides".
    factor: str = ""
    #: Columns lie sorted by group, each group filled up to whole steps.
    is_ordered: bool = False
    rows: int = 0
    columns: int = 0
    width: int = 0
    step: int = LARGEST_STEP
    #: Row of the layer's first output, and column that meets x's first.
    first_row: int = 0
    first_column: int = 0

    @property
    def has_words(self) -> bool:
        """Whether values are narrower than a byte and lie in int32 words."""
        return self.bits < 8

    @property
    def is_sliced(self) -> bool:
        """Whether a step's words hold its slices, one in each of their fields, instead of columns in their order.

        Tensor cores take those as they come out of the words. Nothing is filled up for it but what is narrow anyway.
        """
        return self.step == LARGEST_STEP and (self.bits == 4 or (self.kind == FP8 and self.width == self.columns))

    @property
    def slice_columns(self) -> int:
        """Columns of a slice: one field of each of a row's words in a step."""
        return self.step * self.bits // 32

    @property
    def takes_registers(self) -> bool:
        """Whether a product needs more at once than values, sums and one scale an output."""
        has_groups_in_step = self.group < self.step
        return bool(self.zero_bits) or self.kind == E2M1 or self.is_ordered or has_groups_in_step

    @property
    def middle(self) -> int:
        """The code that weighs nothing where codes are symmetric."""
        return 1 << (self.bits - 1)

    @property
    def planes(self) -> tuple[tuple[int, int], ...]:
        """The powers of two that a width up to 8 is made of, each with the bits below it: 3 bits are 2 above 1.

        Each is stored by itself, so that no value straddles the end of a word.
        """
        return tuple((part, self.bits & (part - 1)) for part in (8, 4, 2, 1) if self.bits & part)

    @property
    def row_groups(self) -> int:
        """Scales next to each other."""
        return -(-self.rows // self.block)

    @property
    def stored_columns(self) -> int:
        """Columns in memory of values that are whole bytes."""
        return self.width if self.is_ordered else self.columns


def codec_of(module_format: ModuleFormat, held: Region | None = None, wanted: Region | None = None) -> Codec:
    """The codec of a weight, of which a rank may hold a part, in this format, and compute with less (see `plan.Part`).

    Only for formats that `why_not` has nothing against. Where columns are ordered, `arrange` completes it.
    """
    held = held or whole(module_format.shape)
    wanted = wanted or held
    codec = _READERS[module_format.name](module_format.parameters)
    rows, columns = module_format.shape
    if codec.group >= columns:
        codec = replace(codec, group=ALL)
    step = _step(codec, columns)
    return replace(
        codec,
        rows=rows,
        columns=columns,
        step=step,
        width=-(-columns // step) * step,
        first_row=wanted.rows[0] - held.rows[0],
        first_column=wanted.columns[0] - held.columns[0],
    )


def why_not(module_format: ModuleFormat) -> str | None:
    """Why the Triton kernels cannot run weights of this format; None where they can."""
    if module_format.name not in _READERS or len(module_format.shape) != 2:
        return f"the Triton kernel has no reading of {module_format.name} weights [{len(module_format.shape)} dims]"
    codec = _READERS[module_format.name](module_format.parameters)
    unit = least_step(codec)
    if codec.group % unit and codec.group < module_format.shape[1] and not codec.is_ordered:
        return f"the Triton kernel takes groups that are multiples of {unit} columns, not {codec.group}"
    return None


def least_step(codec: Codec) -> int:
    """The fewest columns of a step: whole words of every plane."""
    return max([SMALLEST_STEP, *(32 // bits for bits, _ in codec.planes if codec.has_words)])


def _step(codec: Codec, columns: int) -> int:
    # Values of 16 bits, and codes joined of planes, take registers: those of 7 bits spilled.
    most = 64 if codec.kind == PLAIN or (codec.has_words and len(codec.planes) > 1) else LARGEST_STEP
    if codec.bits == 4 and columns % LARGEST_STEP == 0 and LARGEST_STEP % codec.group == 0:
        return LARGEST_STEP  # of several groups
    if codec.group != ALL:
        return max(math.gcd(codec.group, most), least_step(codec))
    return max(least_step(codec), min(most, 1 << (columns - 1).bit_length()))


def _plain(p: Any) -> Codec:
    return Codec(PLAIN)


def _fp8(p: Any) -> Codec:
    return replace(_scaled(FP8, p), divides=p.inverse)


def _int8(p: Any) -> Codec:
    return _scaled(INT8, p)


def _scaled(kind: int, p: Any) -> Codec:
    block, group = getattr(p, "block", None) or (ALL if p.granularity == "tensor" else 1, ALL)
    return Codec(kind, 8, group, block, _SCALES[p.scale_dtype])


def _gptq(p: Any) -> Codec:
    codec = Codec(CODES, p.bits, p.group_size, 1, _SCALES[p.scale_dtype], is_ordered=p.act_order)
    return codec if p.symmetric else _with_zeros(codec, p.zero_offset)


def _awq(p: Any) -> Codec:
    return _with_zeros(Codec(CODES, p.bits, p.group_size, 1, _SCALES[p.scale_dtype]))


def _packed(p: Any) -> Codec:
    codec = Codec(CODES, p.bits, p.group_size, 1, _SCALES[p.scale_dtype], is_ordered=p.act_order)
    if p.strategy == "tensor":
        codec = replace(codec, group=ALL, block=ALL)
    if p.symmetric:
        return codec
    return replace(codec, zero_bits=8) if p.strategy == "tensor" else _with_zeros(codec)


def _nvfp4(p: Any) -> Codec:
    factor = "divides" if p.layout == "compressed-tensors" else "multiplies"
    return Codec(E2M1, 4, NVFP4_COLUMNS, 1, "float8_e4m3fn", factor=factor)


def _mxfp4(p: Any) -> Codec:
    return Codec(E2M1, 4, MXFP4_COLUMNS, 1, "float8_e8m0fnu")


def _with_zeros(codec: Codec, offset: int = 0) -> Codec:
    return replace(codec, zero_bits=4 if codec.bits <= 4 else 8, zero_offset=offset)


#: safetensors' dtype code -> torch's name.
_SCALES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E8M0": "float8_e8m0fnu", "U8": "float8_e8m0fnu"}
_READERS: dict[str, Callable[[Any], Codec]] = {
    "plain": _plain,
    "fp8": _fp8,
    "int8": _int8,
    "gptq": _gptq,
    "awq": _awq,
    "packed": _packed,
    "nvfp4": _nvfp4,
    "mxfp4": _mxfp4,
}
