"""A linear layer whose weight is stored in any format: what other kernels leave, without ever a decoded copy."""

from __future__ import annotations

import torch

from . import launch, parts, passes
from .launch import Cut, cut_linear
from .table import Weight, line


class DecodedLinear:
    """y = x · dequant(W)ᵀ + bias. A weight [out, in] of which a codec may leave rows and columns out."""

    def __init__(self, weight: Weight, outputs: int, columns: int) -> None:
        self._weight, self._outputs, self._columns = weight, outputs, columns
        device = weight.tensors["weight"].device
        self._addresses = tuple(line(weight, [weight.codec]))
        #: Parts of each sum that have been written; see `parts.is_last`.
        self._arrived = torch.zeros(launch.MOST_SUMS, dtype=torch.int32, device=device)

    def run(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, output: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x [..., in] -> [..., out] in x's dtype, rounded once; into `output` [rows, out] where that is given."""
        rows = x.reshape(-1, self._columns).contiguous()
        found = self.empty(len(rows), self._outputs, like=rows) if output is None else output
        if len(rows):
            own = self.cut(len(rows))
            (self._run_in_parts if own.parts > 1 else self._run_whole)(rows, bias, found, own)
        return found.view(*x.shape[:-1], self._outputs)

    def empty(self, *shape: int, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Where every tensor that kernels write comes from."""
        return like.new_empty(shape, dtype=dtype)

    def cut(self, rows: int) -> Cut:
        """How the product of so many rows is cut."""
        return cut_linear(rows, self._columns, self._outputs, self._weight.codec.takes_registers)

    def _run_in_parts(self, x: torch.Tensor, bias: torch.Tensor | None, output: torch.Tensor, own: Cut) -> None:
        grid = own.grid(self._outputs, len(x))
        assert grid[0] * grid[1] <= len(self._arrived)
        sums = self.empty(own.parts, len(x), self._outputs, like=x, dtype=torch.float32)
        parts.linear_parts[grid](
            x, sums, self._arrived, output, x if bias is None else bias, self._addresses, len(x),
            COLUMNS=self._columns, OUTPUTS=self._outputs, CODECS=(self._weight.codec,), HAS_BIAS=bias is not None,
            PARTS=own.parts, **launch.overlap(x), **launch.options(own.tiles, x),
        )  # fmt: skip

    def _run_whole(self, x: torch.Tensor, bias: torch.Tensor | None, output: torch.Tensor, own: Cut) -> None:
        passes.linear[own.grid(self._outputs, len(x))](
            x, output, x if bias is None else bias, self._addresses, len(x),
            COLUMNS=self._columns, OUTPUTS=self._outputs, CODECS=(self._weight.codec,), HAS_BIAS=bias is not None,
            **launch.overlap(x), **launch.options(own.tiles, x),
        )  # fmt: skip
