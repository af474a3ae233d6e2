"""Values that no weight may have: NaN, infinities, scales that were never filled, groups that do not exist.

Every one of them is a number to a kernel, and the model goes on answering.
"""

from __future__ import annotations

import math

import torch

from ..errors import InvalidValueError
from . import tensor_specs
from .base import ModuleFormat
from .bit_stream import packing, unpack

#: Local names of scales, whatever the format.
SCALES = frozenset(
    (
        *("scales", "scale", "weight_scale", "weight_scale_inv", "weight_scale_2", "weight_global_scale"),
        *("input_scale", "input_global_scale"),
    )
)
_GROUPS = ("g_idx", "weight_g_idx")
#: What engines put where a scale will be loaded to: a file that holds it was written from one that never was.
UNFILLED = float(torch.finfo(torch.float32).min)
_CHUNK = 1 << 22


def check_values(local: str, tensor: torch.Tensor, module_format: ModuleFormat, *, everything: bool = False) -> None:
    """Raise InvalidValueError for a tensor of a module (whole, or any part of it) that cannot be one of a model.

    Scales, vectors and the codes of FP8 are looked at always, matrices in floats with `everything`.
    """
    if tensor.numel() == 0:
        return
    if local == "weight_shape":
        _check_shape(local, tensor, module_format)
    elif local == "qzeros" and getattr(module_format.parameters, "symmetric", False):
        _check_zero_points(local, tensor, module_format)
    elif local in _GROUPS:
        _check_groups(local, tensor, module_format)
    elif local in SCALES:
        _check_scale(local, tensor)
    elif everything or tensor.dim() < 2 or tensor.dtype == torch.float8_e4m3fn:
        _check_finite(local, tensor)


def _check_shape(local: str, tensor: torch.Tensor, module_format: ModuleFormat) -> None:
    if tensor.tolist() != list(module_format.shape):
        raise InvalidValueError(
            f"a shape of {tensor.tolist()}",
            tensor=local,
            rule=f"the weight is {list(module_format.shape)}",
            remedy=_AGAIN,
        )


def _check_zero_points(local: str, words: torch.Tensor, module_format: ModuleFormat) -> None:
    """Kernels of symmetric weights never look at zero points: others than the middle would be lost without a word."""
    p, rows = module_format.parameters, module_format.shape[0]
    middle = (1 << (p.bits - 1)) - p.zero_offset
    filled = rows % packing(p.bits)[0] and words.shape != tensor_specs(module_format)[local].shape
    if filled or not p.zero_offset_known:  # a part of the words may end in what only fills them
        return
    # Unpacking takes longer than reading: a word of nothing but middles is known without.
    if 32 % p.bits == 0 and bool((words == _repeated(middle, p.bits)).all()):
        return
    zeros = unpack(words, p.bits, 1)[:, :rows]
    if bool((zeros == middle).all()):
        return
    raise InvalidValueError(
        f"zero points from {int(zeros.min())} to {int(zeros.max())}",
        tensor=local,
        rule=f"config.json says sym: then every stored zero point is {middle}",
        remedy='set "sym": false in quantization_config if the quantizer used zero points',
    )


def _repeated(value: int, bits: int) -> int:
    """The int32 word that holds a value over and over."""
    word = sum(value << place for place in range(0, 32, bits))
    return word - (word >> 31 << 32)


def _check_groups(local: str, tensor: torch.Tensor, module_format: ModuleFormat) -> None:
    specs = tensor_specs(module_format)
    along = specs["scales"].shape[0] if "scales" in specs else specs["weight_scale"].shape[-1]
    low, high = (int(end) for end in tensor.aminmax())
    if low < 0 or high >= along:
        raise InvalidValueError(
            f"groups from {low} to {high}", tensor=local, rule=f"the scales have {along} groups", remedy=_AGAIN
        )


def _check_scale(local: str, scale: torch.Tensor) -> None:
    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):  # powers of two, of which none is zero
        _check_finite(local, scale)
        return
    low, high = _range(scale, local)
    if not (math.isfinite(low) and math.isfinite(high)):
        _check_finite(local, scale)
    # No finite number is less than UNFILLED.
    if low == high == 0 or low == UNFILLED:
        raise InvalidValueError(
            "the scales were never filled: all are zero, or some are what engines put in place of one",
            tensor=local,
            rule="a scale is a number other than zero wherever a weight is",
            remedy=_AGAIN,
        )


def _check_finite(local: str, tensor: torch.Tensor) -> None:
    flat = tensor.reshape(-1)
    for start in range(0, len(flat), _CHUNK):
        part = flat[start : start + _CHUNK]
        if not _is_finite(part, local):
            while len(part) > 1:
                half = len(part) // 2
                if _is_finite(part[:half], local):
                    start, part = start + half, part[half:]
                else:
                    part = part[:half]
            place = [int(one) for one in torch.unravel_index(torch.tensor(start), tensor.shape)]
            raise InvalidValueError(
                f"the value at {place} is {float(_as_float(part, local))}",
                tensor=local,
                rule="scales and weights are finite numbers",
                remedy=_AGAIN,
            )


def _is_finite(part: torch.Tensor, local: str) -> bool:
    if part.dtype == torch.float8_e4m3fn:
        # Codes 0x7F and 0xFF are NaN: the greatest of all, once signed and once not.
        return int(part.view(torch.int8).amax()) < 127 and int(part.view(torch.uint8).amax()) < 255
    if part.dtype == torch.float8_e8m0fnu or (part.dtype == torch.uint8 and local in SCALES):
        return int(part.view(torch.uint8).amax()) < 255
    if not part.is_floating_point():
        return True
    # NaN goes through both, and an infinity is one of them.
    return all(map(math.isfinite, _range(part, local)))


def _range(part: torch.Tensor, local: str) -> tuple[float, float]:
    low, high = _as_float(part, local).aminmax()
    return low.item(), high.item()


def _as_float(part: torch.Tensor, local: str) -> torch.Tensor:
    if part.dtype == torch.uint8:
        part = part.view(torch.float8_e8m0fnu)
    return part.to(torch.float32) if part.itemsize == 1 else part


_AGAIN = "download or export the checkpoint again, or map this module to another source"
