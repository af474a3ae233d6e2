"""Whether quantized weights are those of their own module: compared with the 16-bit original, where a source has it.

Quantizing moves a weight by a part of a step, smoothing scales its columns: neither turns the sign of a large one. Of
another module's weights, every second sign is another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..checkpoint import Checkpoint, Read, join, opened, read_entry
from ..errors import DifferentBaseError
from ..formats import get_format
from ..formats.slicing import Region, cut, rebase, tensor_ranges, whole, widen

if TYPE_CHECKING:
    from .plan import Plan, PlannedModule

#: Rows that are compared, and the least share of their large weights whose signs must agree.
ROWS, AGREEMENT = 64, 0.7
#: Fewer large weights than these prove nothing.
_ENOUGH = 256


def compare_with_originals(plan: Plan) -> int:
    """How many modules were compared: those that are quantized, and that a used source holds in 16 bits.

    Reads the first rows of each. Raises DifferentBaseError for one that is another module's, or another model's.
    """
    plain = {name: checkpoint for name, checkpoint in plan.checkpoints.items() if not checkpoint.quantization}
    compared = 0
    for module in plan.modules.values():
        if module.format.name == "plain" or len(module.format.shape) != 2:
            continue
        original = next((one for one in plain.values() if module.name in one.modules), None)
        if original is not None and original.format(module.name).name == "plain":
            compared += 1
            agreement = _agreement(module, plan.checkpoints[module.source], original)
            if agreement is not None and agreement < AGREEMENT:
                raise _another(module, plan.checkpoints[module.source], original, agreement)
    return compared


def _agreement(module: PlannedModule, checkpoint: Checkpoint, original: Checkpoint) -> float | None:
    everything = whole(module.format.shape)
    held = widen(module.format, Region((0, min(ROWS, everything.rows[1])), everything.columns))
    part = cut(module.format, held)
    ranges = tensor_ranges(module.format, held)
    tensors = {
        local: rebase(local, _read(checkpoint, module.name, local, ranges.get(local)), module.format, held)
        for local in module.tensors
        if local != "bias"
    }
    ours = get_format(part.name).dequantize(tensors, part.parameters, torch.float32)
    theirs = _read(original, module.name, "weight", (held.rows, held.columns)).float()
    large = (theirs.abs() > theirs.abs().mean()) & (ours != 0)
    count = int(large.count_nonzero())
    return float(((ours > 0) == (theirs > 0))[large].float().mean()) if count >= _ENOUGH else None


def _read(checkpoint: Checkpoint, module: str, local: str, ranges: tuple[tuple[int, int], ...] | None) -> torch.Tensor:
    entry = checkpoint.locate(module, local)
    path = checkpoint.files[entry.file]
    with opened(path) as descriptor:
        return read_entry(descriptor, path, Read(join(module, local), entry, ranges))


def _another(
    module: PlannedModule, checkpoint: Checkpoint, original: Checkpoint, agreement: float
) -> DifferentBaseError:
    return DifferentBaseError(
        f"{module.source} holds another weight here than {original.path}: {agreement:.0%} of the signs agree",
        file=checkpoint.file_of(module.name),
        tensor=module.name,
        rule=f"of the large weights of a matrix at least {AGREEMENT:.0%} keep their sign when it is quantized",
        remedy="the file's modules are in another order (experts, layers), or another model's: use another checkpoint",
    )
