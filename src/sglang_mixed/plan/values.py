"""Every planned tensor read once for its values, without an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..checkpoint import opened, read_entries
from ..errors import InvalidValueError
from ..formats.values import check_values
from ..kernels.implied import implied

if TYPE_CHECKING:
    from .plan import Plan


def verify_values(plan: Plan) -> int:
    """The bytes that were looked at: all that is planned. Raises InvalidValueError naming every tensor that is broken.

    At most one tensor is in memory (of those that share a stored matrix, that too).
    """
    found: list[InvalidValueError] = []
    nbytes = 0
    for _, path, reads in plan.rank().reads():
        with opened(path) as descriptor:
            for read in reads:
                for name, tensor, size in read_entries(descriptor, path, [read], lambda _: None):
                    nbytes += size
                    try:
                        check_planned(plan, name, tensor, everything=True)
                    except InvalidValueError as error:
                        found.append(error)
    plan.require_unchanged()
    if found:
        raise _all_of(found)
    return nbytes


def check_planned(plan: Plan, name: str, tensor: torch.Tensor, *, everything: bool) -> None:
    """`check_values` of a tensor by its full name. Raises InvalidValueError that names it and its file."""
    owner, _, local = name.rpartition(".")
    module = plan.modules[owner]
    # What a format implies is told by one operator, and a look at its values takes three.
    expected = implied(module.format).get(local)
    if expected is not None and tensor.dtype == expected.dtype and torch.equal(tensor.cpu(), expected):
        return
    try:
        check_values(local, tensor, module.format, everything=everything)
    except InvalidValueError as error:
        checkpoint = plan.checkpoints[module.source]
        error.tensor, error.file = name, str(checkpoint.files[checkpoint.locate(owner, local).file])
        raise


def _all_of(found: list[InvalidValueError]) -> InvalidValueError:
    first = found[0]
    more = "".join(f"\n    {error.tensor}: {error.what}" for error in found[1:20])
    left = f"\n    ... and {len(found) - 20} more" if len(found) > 20 else ""
    if more:
        what = f"{first.what}; {len(found) - 1} more tensors are broken:{more}{left}"
        return InvalidValueError(what, file=first.file, tensor=first.tensor, rule=first.rule, remedy=first.remedy)
    return first
