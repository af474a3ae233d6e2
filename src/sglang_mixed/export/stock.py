"""Mixes that other tools read too: all that is quantized is as one source's own config says, and the rest can be named.

That config then stays in config.json, with its list of what is not quantized made longer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..checkpoint import Checkpoint
from ..plan import Plan, PlannedModule
from ..plan.families import expert_of
from ..plan.fused import running_together

Config = Mapping[str, Any]
#: A source's (or a part of one's) quantization config, and what the mix takes from it.
Part = tuple[Config, list[PlannedModule]]


def stock_config(plan: Plan, parts: Iterable[Part]) -> dict[str, Any] | None:
    """The `quantization_config` by which other tools read the mix: {} without quantization, None where none can."""
    if any(checkpoint.has_fused_experts for checkpoint in plan.checkpoints.values()) or not _runs_alike(plan):
        return None
    quantized = [_of_tool(config) for config, modules in parts if any(map(_is_quantized, modules))]
    if not quantized:
        return {}
    config = quantized[0]
    if any(other != config for other in quantized):
        return None
    plain = [one.name for one in plan.modules.values() if not _is_quantized(one) and len(one.format.shape) == 2]
    # What a source of this config holds in 16 bits as well, the config need not be told.
    sources = [one for one in plan.checkpoints.values() if _of_tool(one.quantization) == config]
    left = [name for name in plain if not any(_holds_plain(one, name) for one in sources)]
    if not left:
        return config
    write = _WRITERS.get(str(config.get("quant_method")))
    found = write(config, _unique(left), _unique(plain)) if write else None
    return {**config, **found} if found and not _names_more(plan, plain) else None


def _of_tool(config: Config) -> dict[str, Any]:
    """Without what only we understand, and without the scales of a cache, which are not exported."""
    found = {key: value for key, value in config.items() if key != "zero_offset"}
    return {**found, "kv_cache_scheme": None} if found.get("kv_cache_scheme") else found


def _is_quantized(module: PlannedModule) -> bool:
    return module.format.name != "plain"


def _holds_plain(checkpoint: Checkpoint, module: str) -> bool:
    return module in checkpoint.modules and checkpoint.format(module).name == "plain"


def _runs_alike(plan: Plan) -> bool:
    """Whether every matrix that engines make of several, and each layer's experts, are quantized as a whole or not."""
    verdicts: dict[object, bool] = {}
    for module in plan.modules.values():
        expert = expert_of(module.name.rpartition(".")[0])
        whole = expert[0] if expert else running_together(module.name)
        if whole and verdicts.setdefault(whole, _is_quantized(module)) != _is_quantized(module):
            return False
    return True


def _names_more(plan: Plan, plain: Iterable[str]) -> bool:
    """Whether a name begins that of something quantized, which some tools would then leave too."""
    quantized = (one.name for one in plan.modules.values() if _is_quantized(one))
    begins = tuple(_unique(plain))
    return any(name.startswith(begins) for name in _unique(quantized))


def _unique(modules: Iterable[str]) -> list[str]:
    """A layer's experts go by one name: all of them are alike here, and most tools hold them in one module."""
    experts = ((name, expert_of(name.rpartition(".")[0])) for name in modules)
    return list(dict.fromkeys(expert[0] if expert else name for name, expert in experts))


def _listed(config: Config, left: list[str], plain: list[str]) -> dict[str, Any]:
    """Under each of the keys that is there: a tool that reads both takes the first that it finds.

    Without a list, tools leave the head by themselves; with one, only what it names.
    """
    keys = [key for key in ("ignored_layers", "modules_to_not_convert") if config.get(key)]
    return {key: [*config[key], *left] for key in keys} or {"modules_to_not_convert": plain}


def _ignored(config: Config, left: list[str], _: list[str]) -> dict[str, Any]:
    """compressed-tensors: exact names, and expressions for what has others below it."""
    names = [f"re:{re.escape(name)}.*" if name.endswith(".experts") else name for name in left]
    return {"ignore": [*(config.get("ignore") or ()), *names]}


def _excluded(config: Config, left: list[str], _: list[str]) -> dict[str, Any]:
    """GPTQModel: expressions that match from a name's start."""
    rules: dict[str, Any] = {f"-:{re.escape(name)}{'' if name.endswith('.experts') else '$'}": {} for name in left}
    return {"dynamic": {**(config.get("dynamic") or {}), **rules}}


#: quant_method -> how its config names what is not quantized.
_WRITERS: dict[str, Callable[[Config, list[str], list[str]], dict[str, Any]]] = {
    "awq": _listed,
    "compressed-tensors": _ignored,
    "fp8": _listed,
    "gptq": _excluded,
}
