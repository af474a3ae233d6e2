"""Modules that the engine reads as they are: routers, norms, embeddings and the like have no compressed form there."""

from __future__ import annotations

from collections.abc import Mapping

from ..checkpoint import Checkpoint
from ..errors import UnsupportedError
from ..formats import label_of
from .families import runs_in_16_bits
from .fold import fold
from .plan import PlannedModule
from .resolve import Assignment


def check_16_bits(
    modules: Mapping[str, PlannedModule], checkpoints: Mapping[str, Checkpoint], assignment: Assignment
) -> None:
    """Raise UnsupportedError where the map takes such a module from a source that holds it compressed."""
    compressed = [modules[name] for name in filter(runs_in_16_bits, modules) if modules[name].format.name != "plain"]
    if not compressed:
        return
    first = compressed[0]
    label = label_of(first.format)
    names = fold(one.name for one in compressed)
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    sources = [name for name, checkpoint in checkpoints.items() if _holds_plain(checkpoint, first.name)]
    lines = "".join(f'\n    "{pattern}": {sources[0]}' for pattern in names[:8]) if sources else ""
    raise UnsupportedError(
        f"{first.source} holds {names[0]}{more} as {label}",
        file=checkpoints[first.source].file_of(first.name),
        tensor=first.name,
        rule=f"the engine reads routers, norms, embeddings and heads in 16 bits (chosen by "
        f"{assignment.reason(first.name)})",
        remedy=f"add to weight_mapping:{lines}" if lines else "map it to a source that holds it in BF16 or FP16",
    )


def _holds_plain(checkpoint: Checkpoint, module: str) -> bool:
    return module in checkpoint.modules and checkpoint.format(module).name == "plain"
