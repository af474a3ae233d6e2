"""What a model still expects: one line per (module, shard, expert, tensor) and its bytes, struck out as they arrive.

A tensor comes in one piece. So a line is open or closed, and no part of a place is filled twice or left as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ...errors import LedgerError


class Line(NamedTuple):
    """One tensor that the model waits for: of a layer of ours by checkpoint module, else by SGLang's layer and slot.

    `shard`: q/k/v, 0/1, w1/w2/w3 or None.
    """

    module: str
    shard: str | int | None
    expert: int | None
    tensor: str

    def __str__(self) -> str:
        shard = "" if self.shard is None else f" shard {self.shard}"
        expert = "" if self.expert is None else f" expert {self.expert}"
        return f"{self.module}.{self.tensor}{shard}{expert}"


class Ledger:
    """Open lines must be none at the end of a load, and no line may be struck out twice."""

    def __init__(self) -> None:
        #: Line -> bytes that its place holds.
        self._open: dict[Line, int] = {}
        self._closed: set[Line] = set()

    def expect(self, line: Line, nbytes: int) -> None:
        """Open a line for so many bytes."""
        self._open[line] = nbytes

    def arrive(self, nbytes: int, *lines: Line) -> None:
        """Strike out the lines that one delivery of so many bytes fills. Raises LedgerError unless it fills them."""
        for line in lines:
            if line not in self._open:
                state = "arrived twice" if line in self._closed else "was not expected"
                raise LedgerError(f"weight {state}: {line}", tensor=str(line), rule="every slot is filled exactly once")
        expected = sum(self._open[line] for line in lines)
        if nbytes != expected:
            names = ", ".join(map(str, lines))
            raise LedgerError(
                f"{nbytes:,} of {expected:,} bytes arrived: {names}",
                tensor=names,
                rule="a weight fills every byte of its place, and no other",
            )
        for line in lines:
            del self._open[line]
        self._closed.update(lines)

    def close(self, unused: Sequence[str] = ()) -> None:
        """Raise LedgerError, listing them, if weights are missing or planned tensors were left unused."""
        problems = sorted(f"missing: {line}: 0 of {nbytes:,} bytes arrived" for line, nbytes in self._open.items())
        problems += [f"read but used by nothing in the model: {name}" for name in unused]
        if not problems:
            return
        shown = "\n    ".join(problems[:20]) + (
            f"\n    ... and {len(problems) - 20} more" if len(problems) > 20 else ""
        )
        raise LedgerError(
            f"{len(problems)} weights do not match between the plan and the engine's model:\n    {shown}",
            rule="every weight of the model is filled from the plan, and every planned tensor is used",
            remedy="check that the base checkpoint and its config.json belong together "
            "(tie_word_embeddings, number of layers and experts)",
        )
