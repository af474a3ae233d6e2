"""Layers on an accelerator: SGLang's default for 16 bits, its kernels behind a method of ours for all else.

A method is built from how each part is stored, not from its checkpoint's config: that says nothing of single modules
where it names patterns, and SGLang reads it by the fused layer's name.
"""

from __future__ import annotations

from collections.abc import Sequence

from sglang.srt.layers.quantization.base_config import QuantizeMethodBase
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

from ..errors import ParallelismError, UnsupportedError
from ..formats import ModuleFormat, get_format
from ..formats.slicing import Region, whole, widen
from ..plan import PlannedModule, RankPlan
from ..plan.fold import fold
from .grouped_moe import MixedMoE
from .linear_methods import why_not
from .moe import ExpertModules
from .split_linear import SplitLinear


class StockMethods:
    """The method of each layer. Raises at once for formats that none can run."""

    def __init__(self, plan: RankPlan) -> None:
        refuse_formats(plan)
        self._plan = plan

    def linear(self, prefix: str, parts: Sequence[PlannedModule]) -> QuantizeMethodBase:
        """The method for a linear layer made of these parts."""
        refuse_torn(self._plan, parts)
        is_plain, last = all(part.format.name == "plain" for part in parts), prefix.rpartition(".")[2]
        if last == "kv_b_proj" and not is_plain:
            raise UnsupportedError(
                f"latent attention multiplies by the halves of kv_b_proj, here {parts[0].format.name}, in 16 bits",
                tensor=prefix,
                remedy=f'map "**.kv_b_proj" to a 16-bit source, or serve on the CPU; now it is {parts[0].source}',
            )
        # SGLang's models concatenate this one's parts before they load them, which no part's name survives.
        concatenated = last == "fused_qkv_a_proj_with_mqa"
        return UnquantizedLinearMethod() if is_plain and not concatenated else SplitLinear(list(parts))

    def experts(self, prefix: str, experts: Sequence[ExpertModules]) -> QuantizeMethodBase | None:
        """The method for a layer of these experts, all of this rank; None is SGLang's own for 16 bits."""
        if any(module.bias for expert in experts for module in expert):
            raise UnsupportedError(
                "on an accelerator experts with biases are not served from a map",
                tensor=prefix,
                rule="SGLang loads these from tensors of all experts of a layer only, and multiplies by each format's "
                "experts without biases",
                remedy="serve this checkpoint without a map, or on the CPU",
            )
        if all(module.format.name == "plain" for expert in experts for module in expert):
            return None
        return MixedMoE(prefix, experts)


def refuse_formats(plan: RankPlan) -> None:
    """Raise UnsupportedError, before a weight is read, for formats that no kernel of SGLang runs on an accelerator."""
    refused: dict[ModuleFormat, list[str]] = {}
    for name in plan.parts:
        module_format = plan.plan.modules[name].format
        if why_not(module_format):
            refused.setdefault(module_format, []).append(name)
    if not refused:
        return
    formats = {get_format(one.name).label(one.parameters): str(why_not(one)) for one in refused}
    raise UnsupportedError(
        f"no kernel of SGLang here runs weights in {', '.join(formats)}",
        tensor=", ".join(fold(name for names in refused.values() for name in names)),
        rule="; ".join(dict.fromkeys(formats.values())),
        remedy="map these modules to a source in another format, or serve on the CPU, which computes any format",
    )


def refuse_torn(plan: RankPlan, parts: Sequence[PlannedModule]) -> None:
    """Raise ParallelismError where this layout cuts a linear layer inside a block, a group or a word."""
    for module in parts:
        part = plan.parts[module.name]
        if part.is_exact:
            continue
        side = 0 if part.wanted.rows != part.held.rows else 1
        (begin, end), (first, last) = part.wanted[side], part.held[side]
        size, unit = module.format.shape[side], last - first
        label = get_format(module.format.name).label(module.format.parameters)
        divisors = [ways for ways in range(1, plan.rank.tp) if size % ways == 0]
        fitting = [ways for ways in divisors if _fits(module.format, side, size // ways)]
        raise ParallelismError(
            f"--tp-size {plan.rank.tp} gives a rank {('rows', 'columns')[side]} {begin} to {end} of {size}, "
            f"inside a unit of {label} ({first} to {last})",
            tensor=module.name,
            rule="SGLang's kernels run whole blocks, groups and words",
            remedy=f"choose --tp-size of {', '.join(map(str, fitting))}, or map this module to a source whose units "
            f"divide {end - begin} (of these, {unit} {('rows', 'columns')[side]} belong together)",
        )


def _fits(module_format: ModuleFormat, side: int, share: int) -> bool:
    rows, columns = whole(module_format.shape)
    region = Region((0, share), columns) if side == 0 else Region(rows, (0, share))
    return widen(module_format, region) == region
