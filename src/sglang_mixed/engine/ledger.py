"""What a model still expects: one line per (module, shard, expert, tensor), struck out as weights arrive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..errors import LedgerError


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
        self._open: set[Line] = set()
        self._closed: set[Line] = set()

    def expect(self, line: Line) -> None:
        """Open a line."""
        self._open.add(line)

    def arrive(self, line: Line) -> None:
        """Strike a line out. Raises LedgerError where nothing waits for it."""
        if line not in self._open:
            state = "arrived twice" if line in self._closed else "was not expected"
            raise LedgerError(f"weight {state}: {line}", tensor=str(line), rule="every slot is filled exactly once")
        self._open.remove(line)
        self._closed.add(line)

    def close(self, unused: Sequence[str] = ()) -> None:
        """Raise LedgerError, listing them, if weights are missing or planned tensors were left unused."""
        problems = [f"missing: {line}" for line in sorted(map(str, self._open))]
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
