"""Smoothing that a quantizer folded into norms: such a norm and what reads it only make sense together."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import SmoothingError
from .families import norm_readers
from .fused import advise, describe
from .plan import PlannedModule
from .resolve import Assignment
from .same_base import Comparison


def check_smoothing(
    compared: Mapping[str, Comparison], modules: Mapping[str, PlannedModule], assignment: Assignment
) -> None:
    """Raise SmoothingError, with the lines to add, where a changed norm and its readers come from several sources."""
    torn: dict[str, list[str]] = {}
    blamed = ""
    for norm in dict.fromkeys(name for comparison in compared.values() for name in comparison.norms):
        group = [norm, *norm_readers(norm, modules)]
        sources = {modules[name].source for name in group}
        changed = [source for source in sorted(sources) if source in compared and norm in compared[source].norms]
        if changed and len(sources) > 1:
            torn[norm] = group
            blamed = blamed or changed[0]
    if not torn:
        return
    norm, group = next(iter(torn.items()))
    difference = compared[blamed].norms.get(norm) or next(iter(compared[blamed].norms.values()))
    listing = "".join(f"\n    {line}" for line in describe(group, modules, assignment))
    more = f" (and {len(torn) - 1} more norms)" if len(torn) > 1 else ""
    everything = [name for names in torn.values() for name in names]
    raise SmoothingError(
        f"{blamed} changed {norm}{more}, and what reads it comes from several sources:{listing}",
        tensor=f"{difference.module}.weight: {difference.ours:.6g} in {blamed}, {difference.base:.6g} in the base",
        rule="where smoothing is folded into a norm, the norm and every linear that reads it come from one source",
        remedy=advise(everything, blamed, assignment),
    )
