"""What an exported mix says of itself: config.json, and its model card."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint
from ..formats.mix import KEY, mix_config
from ..plan import Plan, PlannedModule
from ..plan.fold import by_template, fold
from .stock import stock_config

#: Where a config may say how its own checkpoint is quantized.
_QUANTIZATION = ("quantization_config", "compression_config", KEY)
#: Lines of a model card's front matter that are carried over.
_LICENSE = re.compile(r"^(license|license_name|license_link):[ \t]*(\S.*?)[ \t]*$", re.MULTILINE)
_FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)^---\r?$", re.DOTALL | re.MULTILINE)
_SNAPSHOT = re.compile(r"models--([^/]+)--([^/]+)")


def exported_config(plan: Plan) -> dict[str, Any]:
    """config.json: the base's, and of every source its own quantization config and which modules are of it.

    That is the `quantization_config`, unless other tools can read the mix: they get one that they know, and it stands
    under a key of its own beside that.
    """
    config = _unquantized(plan.checkpoints[plan.base].config)
    if isinstance(config.get("text_config"), Mapping):
        config["text_config"] = _unquantized(config["text_config"])
    known = by_template(plan.modules)
    parts = _parts(plan)
    described = mix_config(
        {
            name: (fold((module.name for module in modules), known), quantization)
            for name, (quantization, modules) in parts.items()
        }
    )
    stock = stock_config(plan, parts.values())
    if stock is None:
        return {**config, "quantization_config": described}
    return {**config, **({"quantization_config": stock} if stock else {}), KEY: described}


def _unquantized(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _QUANTIZATION}


def _parts(plan: Plan) -> dict[str, tuple[dict[str, Any], list[PlannedModule]]]:
    """Part's name -> its quantization config and modules: a source, or the part of one that is an exported mix."""
    names: dict[tuple[str, str, int | None], str] = {}
    parts: dict[str, tuple[dict[str, Any], list[PlannedModule]]] = {}
    for module in plan.modules.values():
        checkpoint = plan.checkpoints[module.source]
        origin, config = checkpoint.origin(module.name)
        offset = _proven_offset(module, checkpoint)
        name = names.get((module.source, origin, offset))
        if name is None:
            name = names[module.source, origin, offset] = _free_name(origin or module.source, parts)
            parts[name] = {**config, **({} if offset is None else {"zero_offset": offset})}, []
        parts[name][1].append(module)
    return parts


def _proven_offset(module: PlannedModule, checkpoint: Checkpoint) -> int | None:
    """How zero points are stored, where the source's config leaves it open and the plan found it out."""
    offset: int | None = getattr(module.format.parameters, "zero_offset", None)
    if offset is None:
        return None
    tensors = {local: checkpoint.modules[module.name][local] for local in module.tensors}
    said = checkpoint.format(module.name, tensors).parameters
    return None if said.zero_offset_known else offset


def _free_name(wanted: str, taken: Mapping[str, object]) -> str:
    numbered = (wanted if number == 1 else f"{wanted}_{number}" for number in range(1, len(taken) + 2))
    return next(name for name in numbered if name not in taken)


def model_card(plan: Plan, title: str, config: Mapping[str, Any]) -> str:
    """README.md: what came from where, under which licences, and how to serve it. No path of this machine."""
    licences = {name: _licence(path) for name, path in plan.sources.items()}
    base = licences[plan.base]
    lines = ["---", *(f"{key}: {value}" for key, value in base.items()), "library_name: sglang-mixed", "---", ""]
    lines += [
        f"# {title}",
        "",
        "One model composed of several checkpoints; every tensor's bytes are those of its source.",
        "",
    ]
    lines += ["| source | checkpoint | modules | MiB in memory | licence |", "| --- | --- | --- | --- | --- |"]
    for name, path in plan.sources.items():
        own = [module for module in plan.modules.values() if module.source == name]
        size = sum(map(plan.module_bytes, own)) / 2**20
        licence = licences[name].get("license_name") or licences[name].get("license") or "not said"
        lines.append(f"| {name} | {checkpoint_name(path)} | {len(own)} | {size:,.2f} | {licence} |")
    lines += ["", "| modules | source | format | count | MiB in memory | MiB in 16 bits |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    lines += [
        f"| `{row.modules}` | {row.source} | {row.format} | {row.count} | {row.nbytes / 2**20:,.2f} "
        f"| {row.bf16_bytes / 2**20:,.2f} |"
        for row in plan.rows()
    ]
    lines += ["", f"Plan: `{plan.fingerprint}`. `sha256sum -c SHA256SUMS` verifies the weights.", ""]
    if KEY in config:  # beside what other tools read
        stock = config.get("quantization_config")
        method = f"its {stock['quant_method']} config" if stock else "no quantization"
        lines += [f"Tools that know of no mixes find {method} in config.json, and read the same weights.", ""]
    lines += ["```bash", "pip install sglang-mixed   # beside SGLang", "sglang serve --model-path FOLDER", "```", ""]
    return "\n".join(lines)


def checkpoint_name(path: Path) -> str:
    """What a source's folder is called: its hub name if it lies in the hub's cache, else the folder's own name."""
    found = _SNAPSHOT.search(str(path))
    return "/".join(found.groups()) if found else path.name


def _licence(folder: Path) -> dict[str, str]:
    """`license`, `license_name` and `license_link` of a checkpoint's model card."""
    card = folder / "README.md"
    if not card.is_file():
        return {}
    matter = _FRONT_MATTER.match(card.read_text(encoding="utf-8", errors="replace"))
    return dict(_LICENSE.findall(matter[1])) if matter else {}
