"""A linear layer whose weight is stored in any format: what other kernels leave, without ever a decoded copy."""

from __future__ import annotations

import torch
import triton

from . import passes
from .launch import dot_type, tiles_for
from .table import Weight, line, table


class DecodedLinear:
    """y = x · dequant(W)ᵀ + bias. A weight [out, in] of which a codec may leave rows and columns out."""

    def __init__(self, weight: Weight, outputs: int, columns: int) -> None:
        self._weight, self._outputs, self._columns = weight, outputs, columns
        self._table = table([line(weight, [weight.codec])], weight.tensors["weight"].device)

    def run(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, output: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x [..., in] -> [..., out] in x's dtype, rounded once; into `output` [rows, out] where that is given."""
        rows = x.reshape(-1, self._columns).contiguous()
        found = rows.new_empty(len(rows), self._outputs) if output is None else output
        tiles = tiles_for([self._weight.codec], len(rows) > 32)
        grid = triton.cdiv(self._outputs, tiles.outputs), triton.cdiv(len(rows), tiles.rows)
        if len(rows):
            passes.linear[grid](
                rows, found, rows if bias is None else bias, self._table, len(rows),
                COLUMNS=self._columns, OUTPUTS=self._outputs, CODECS=(self._weight.codec,), HAS_BIAS=bias is not None,
                BLOCK_M=tiles.rows, BLOCK_N=tiles.outputs, DOT=dot_type(rows),
                num_warps=tiles.warps, num_stages=tiles.stages,
            )  # fmt: skip
        return found.view(*x.shape[:-1], self._outputs)
