"""`GPTQDequantizer`: GPTQ tensors in hand, without a checkpoint that says what they are."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..errors import InconsistentFormatError
from ..formats import get_format
from ..formats.gptq import PACKING, ZERO_OFFSETS, GPTQParameters

_LOCAL = ("qweight", "qzeros", "scales", "g_idx")


class GPTQDequantizer:
    """GPTQ weights of 2, 3, 4 or 8 bits."""

    @staticmethod
    def dequantize_gptq_weight(
        qweight: torch.Tensor,
        qzeros: torch.Tensor,
        scales: torch.Tensor,
        g_idx: torch.Tensor | None = None,
        bits: int = 4,
        group_size: int = 128,
        *,
        checkpoint_format: str = "gptq",
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """The weight [out, in] in `dtype`, exact in float32.

        qweight int32 [in * bits / 32, out], qzeros int32 [groups, out * bits / 32], scales [groups, out], g_idx [in] of
        act-order. The group size follows from the shapes where `group_size` disagrees with them. `checkpoint_format`
        is `gptq` (stored zero points are one too small) or `gptq_v2`. Raises InconsistentFormatError with the
        arithmetic where the shapes contradict each other.

        >>> GPTQDequantizer.dequantize_gptq_weight(qweight, qzeros, scales).shape                # doctest: +SKIP
        torch.Size([768, 2048])
        """
        if bits not in PACKING or checkpoint_format not in ZERO_OFFSETS:
            raise InconsistentFormatError(
                f"GPTQ of {bits} bits, {checkpoint_format!r}",
                rule=f"bits are {', '.join(map(str, PACKING))}, the checkpoint_format {' or '.join(ZERO_OFFSETS)}",
            )
        columns = _check_shapes(qweight, qzeros, scales, g_idx, bits)
        tensors = {"qweight": qweight, "qzeros": qzeros, "scales": scales}
        parameters = GPTQParameters(
            bits,
            _group_size(columns, len(scales), group_size, has_order=g_idx is not None),
            symmetric=False,
            act_order=g_idx is not None,
            has_g_idx=g_idx is not None,
            zero_offset=ZERO_OFFSETS[checkpoint_format],
            scale_dtype="F16",
        )
        tensors |= {} if g_idx is None else {"g_idx": g_idx}
        return get_format("gptq").dequantize(tensors, parameters, dtype)

    @staticmethod
    def is_gptq_weight(weights: Mapping[str, torch.Tensor], name: str) -> bool:
        """Whether `name`, a module or one of its tensors (or the `weight` it would have), is GPTQ's among `weights`."""
        module, _, local = name.rpartition(".")
        prefix = f"{module}." if local in ("weight", *_LOCAL) and module else f"{name}." if name else ""
        found = [weights.get(f"{prefix}{local}") for local in _LOCAL[:3]]
        qweight, qzeros, scales = found
        if qweight is None or qzeros is None or scales is None:
            return False
        # AWQ packs along the outputs instead: its scales are wider than its qweight.
        return qweight.dim() == scales.dim() == 2 and qweight.shape[1] == scales.shape[1]


def _check_shapes(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, g_idx: torch.Tensor | None, bits: int
) -> int:
    """The number of input columns."""
    values, words = PACKING[bits]
    shapes = f"qweight {list(qweight.shape)}, qzeros {list(qzeros.shape)}, scales {list(scales.shape)}"
    if {one.dim() for one in (qweight, qzeros, scales)} != {2}:
        raise _contradiction(shapes, "every one of them is a matrix")
    (rows, out), groups = qweight.shape, scales.shape[0]
    columns, zero_columns = rows // words * values, -(-out // values) * words
    said = f"{shapes}: at {bits} bits "
    if rows % words:
        raise _contradiction(said + f"qweight's {rows} rows are no multiple of {words}", "its rows are in x bits / 32")
    if scales.shape[1] != out:
        raise _contradiction(said + f"qweight has {out} outputs, scales {scales.shape[1]}", "scales are [groups, out]")
    if tuple(qzeros.shape) != (groups, zero_columns):
        expected = f"{groups} groups of {out} outputs take qzeros [{groups}, {out} x {bits} / 32 = {zero_columns}]"
        raise _contradiction(said + expected, "qzeros are [groups, out x bits / 32]")
    if g_idx is not None and tuple(g_idx.shape) != (columns,):
        expected = f"qweight has {rows} x 32 / {bits} = {columns} inputs, g_idx {g_idx.numel()}"
        raise _contradiction(said + expected, "g_idx is [in]")
    return columns


def _group_size(columns: int, groups: int, said: int, *, has_order: bool) -> int:
    """The size that the shapes make; `said` counts where the last group is a partial one."""
    if said > 0 and groups == -(-columns // said):
        return said
    if not groups or (columns % groups and not has_order):
        raise _contradiction(
            f"{columns} inputs in {groups} groups: {columns} / {groups} is no whole number, and groups of {said} "
            f"would be {-(-columns // said) if said > 0 else 1}",
            "every group but the last has as many inputs",
        )
    return max(1, columns // groups)


def _contradiction(what: str, rule: str) -> InconsistentFormatError:
    return InconsistentFormatError(what, rule=rule, remedy="check bits, and that the tensors are one module's")
