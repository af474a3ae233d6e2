"""Layers on an accelerator: SGLang's default for 16 bits, its kernels behind a method of ours for all else.

A method is built from how each part is stored, not from its checkpoint's config: that says nothing of single modules
where it names patterns, and SGLang reads it by the fused layer's name.
"""

from __future__ import annotations

from collections.abc import Sequence

from sglang.srt.layers.quantization.base_config import QuantizeMethodBase

from ...errors import UnsupportedError
from ...formats import ModuleFormat, label_of
from ...plan import PlannedModule, RankPlan
from ...plan.fold import fold
from . import decoded
from .grouped_moe import MixedMoE
from .linear_methods import why_not
from .moe import ExpertModules
from .plain_linear import PlainLinear
from .split_linear import SplitLinear


class StockMethods:
    """The method of each layer. Raises at once for formats that none can run."""

    def __init__(self, plan: RankPlan) -> None:
        refuse_formats(plan)
        self._plan = plan

    def linear(self, prefix: str, parts: Sequence[PlannedModule]) -> QuantizeMethodBase:
        """The method for a linear layer made of these parts."""
        is_plain, last = all(part.format.name == "plain" for part in parts), prefix.rpartition(".")[2]
        if last == "kv_b_proj" and not is_plain:
            raise UnsupportedError(
                f"latent attention multiplies by the halves of kv_b_proj, here {parts[0].format.name}, in 16 bits",
                tensor=prefix,
                remedy=f'map "**.kv_b_proj" to a 16-bit source, or serve on the CPU; now it is {parts[0].source}',
            )
        # SGLang's models concatenate this one's parts before they load them, which no part's name survives.
        concatenated = last == "fused_qkv_a_proj_with_mqa"
        return PlainLinear() if is_plain and not concatenated else SplitLinear(list(parts))

    def experts(self, prefix: str, experts: Sequence[ExpertModules]) -> QuantizeMethodBase | None:
        """The method for a layer of these experts, all of this rank; None is SGLang's own for 16 bits."""
        modules = [module for expert in experts for module in expert]
        # SGLang loads biases of experts from tensors of all experts of a layer only.
        if all(module.format.name == "plain" and not module.bias for module in modules):
            return None
        return MixedMoE(prefix, experts)


def refuse_formats(plan: RankPlan) -> None:
    """Raise UnsupportedError, before a weight is read, for formats that no kernel runs on an accelerator."""
    refused: dict[ModuleFormat, list[str]] = {}
    for name in plan.parts:
        module_format = plan.plan.modules[name].format
        if why_not(module_format) and decoded.why_not(module_format):
            refused.setdefault(module_format, []).append(name)
    if not refused:
        return
    formats = {label_of(one): f"{why_not(one)}; {decoded.why_not(one)}" for one in refused}
    raise UnsupportedError(
        f"no kernel here runs weights in {', '.join(formats)}",
        tensor=", ".join(fold(name for names in refused.values() for name in names)),
        rule="; ".join(dict.fromkeys(formats.values())),
        remedy="map these modules to a source in another format, or serve on the CPU, which computes any format",
    )
