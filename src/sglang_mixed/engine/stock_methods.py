"""Layers on an accelerator: SGLang's own method where a layer is stored in one way, ours over its kernels elsewhere.

A uniform linear layer runs as SGLang would run it from its source's own config; a layer of 16-bit experts likewise.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization import QUANTIZATION_METHODS
from sglang.srt.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

from ..checkpoint import Checkpoint
from ..errors import ParallelismError, UnsupportedError
from ..formats import ModuleFormat, get_format
from ..formats.slicing import Region, whole, widen
from ..plan import PlannedModule, RankPlan
from ..plan.fold import fold
from ..plan.fused import are_alike
from .grouped_moe import MixedMoE
from .linear_methods import why_not
from .moe import ExpertModules
from .split_linear import SplitLinear


class StockMethods:
    """One SGLang quantization config per source, asked per layer. Raises at once for what no layer here can run."""

    def __init__(self, plan: RankPlan, packed_modules: dict[str, list[str]]) -> None:
        refuse_formats(plan)
        self._plan, self._checkpoints, self._packed_modules = plan, plan.plan.checkpoints, packed_modules
        self._configs: dict[str, QuantizationConfig] = {}

    def linear(self, layer: LinearBase, prefix: str, parts: Sequence[PlannedModule]) -> QuantizeMethodBase:
        """The method for a linear layer made of these parts."""
        refuse_torn(self._plan, parts)
        first, last = parts[0].format, prefix.rpartition(".")[2]
        if last == "kv_b_proj" and first.name != "plain":
            raise UnsupportedError(
                f"latent attention multiplies by the halves of kv_b_proj, here {first.name}, in 16 bits",
                tensor=prefix,
                remedy=f'map "**.kv_b_proj" to a 16-bit source, or serve on the CPU; now it is {parts[0].source}',
            )
        # SGLang's configs know no inverse scales, and its models concatenate this one's parts before they load them.
        ours = getattr(first.parameters, "inverse", False) or last == "fused_qkv_a_proj_with_mqa"
        if ours or not all(are_alike(first, part.format) for part in parts):
            return SplitLinear(list(parts))
        return UnquantizedLinearMethod() if first.name == "plain" else self._stock(layer, prefix, parts[0])

    def experts(self, prefix: str, experts: Sequence[ExpertModules]) -> QuantizeMethodBase | None:
        """The method for a layer of these experts, all of this rank; None is SGLang's own for 16 bits."""
        if all(module.format.name == "plain" for expert in experts for module in expert):
            return None
        return MixedMoE(prefix, experts)

    def _stock(self, layer: LinearBase, prefix: str, module: PlannedModule) -> QuantizeMethodBase:
        method: QuantizeMethodBase | None = self._config(module).get_quant_method(layer, prefix)
        if method is None or type(method).__name__.startswith("Unquantized"):
            raise UnsupportedError(
                f"SGLang would serve this layer in 16 bits, the plan says {module.format.name} from {module.source}",
                tensor=module.name,
                remedy="map this module to a source in a format that this SGLang has a kernel for",
            )
        return method

    def _config(self, module: PlannedModule) -> QuantizationConfig:
        if module.source not in self._configs:
            config = self._configs[module.source] = _build(self._checkpoints[module.source], module)
            config.packed_modules_mapping = self._packed_modules
        return self._configs[module.source]


def _build(checkpoint: Checkpoint, module: PlannedModule) -> QuantizationConfig:
    described = copy.deepcopy(dict(checkpoint.quantization))
    claims = (method.override_quantization_method(described, None) for method in QUANTIZATION_METHODS.values())
    name = next(filter(None, claims), described.get("quant_method"))
    if name not in QUANTIZATION_METHODS:
        raise UnsupportedError(
            f"this SGLang has no quantization method {name!r}",
            file=checkpoint.path / "config.json",
            tensor=module.name,
            remedy=f"use a source in one of: {', '.join(sorted(QUANTIZATION_METHODS))}",
        )
    return QUANTIZATION_METHODS[name].from_config(described)


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
