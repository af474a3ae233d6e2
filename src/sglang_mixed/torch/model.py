"""Loading a plan into a torch module, with every weight left compressed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from ..formats.base import TORCH_DTYPES
from ..memory import rank_memory
from ..plan import Plan
from ..plan.families import is_embedding
from ..stream import ReadLog, stream
from .buffers import compute_buffers
from .cache import DequantizationCache
from .filling import Filling
from .layout import lay_out
from .linear import CompressedModule


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What was loaded: `stats` as `memory_stats` gives them, and what the model holds in another dtype than its file.

    `casts` maps a parameter's name to "file dtype -> dtype".
    """

    stats: dict[str, Any]
    bytes_read: int
    seconds: float
    casts: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """`loaded` (modules), `by_format`, `bytes` in memory, `saved` bytes against 16 bits, `seconds`, and more."""
        stats = self.stats
        return {
            "loaded": sum(total["modules"] for total in stats["by_format"].values()),
            "by_format": stats["by_format"],
            "by_module_kind": stats["by_module_kind"],
            "bytes": stats["weight_bytes"],
            "planned_bytes": stats["planned_bytes"],
            "saved": stats["bf16_bytes"] - stats["weight_bytes"],
            "memory_saved_mb": stats["memory_saved_mb"],
            "compression_ratio": stats["compression_ratio"],
            "bytes_read": self.bytes_read,
            "seconds": self.seconds,
            "casts": self.casts,
        }


def load_plan(
    model: torch.nn.Module,
    plan: Plan,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    cache: DequantizationCache | None = None,
) -> LoadReport:
    """Fill a model, which may be on the `meta` device, from a plan.

    Linear layers and layers of experts are replaced by modules whose weights stay compressed; all else is held in
    `dtype` (that of the map's `inference`, or of the base's embeddings), but for float32 tensors that the model keeps
    so on purpose. `device` is the model's own, or the CPU for one on `meta`. The model is left in eval mode, without
    gradients. Raises what `lay_out` raises, before anything is changed, and what reading raises, which leaves a model
    without weights.
    """
    started = time.perf_counter()
    layout = lay_out(model, plan)
    device = torch.device(device) if device is not None else _device_of(model)
    compute_buffers(model)
    filling = Filling(model, layout, dtype or _dtype_of(plan), cache)
    log = ReadLog()
    for name, _ in stream(plan.rank().reads(), log, filling.destination, filling.receive):
        raise AssertionError(f"{name} was not taken")
    filling.finish()
    model.to(device).eval().requires_grad_(False)
    return LoadReport(memory_stats(model, plan), log.bytes_read, time.perf_counter() - started, filling.casts)


def memory_stats(model: torch.nn.Module, plan: Plan) -> dict[str, Any]:
    """Totals of a loaded model, as the engine's `get_mixed_precision_memory_stats`, and its dequantization cache.

    `weight_bytes` is measured on the storages. What the cache holds is not saved: `memory_saved_mb` is less by it.
    """
    stats = rank_memory(plan.rank())
    caches = {id(one.cache): one.cache for one in model.modules() if isinstance(one, CompressedModule) and one.cache}
    cache = next(iter(caches.values()), DequantizationCache()).stats()
    weight_bytes = _weight_bytes(model)
    return {
        **stats,
        "planned_bytes": plan.weight_bytes(),
        "weight_bytes": weight_bytes,
        "memory_saved_mb": (stats["bf16_bytes"] - weight_bytes - cache["bytes"]) / 2**20,
        "compression_ratio": stats["bf16_bytes"] / weight_bytes if weight_bytes else 1.0,
        "dequantization_cache": cache,
    }


def _weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of the model's parameters and of the buffers that a checkpoint holds, each storage counted once."""
    tensors: list[torch.Tensor] = [*model.parameters()]
    for module in model.modules():
        computed = module._non_persistent_buffers_set
        tensors += [one for name, one in module.named_buffers(recurse=False) if name not in computed]
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())


def _device_of(model: torch.nn.Module) -> torch.device:
    tensors = (tensor for tensor in model.parameters() if not tensor.is_meta)
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _dtype_of(plan: Plan) -> torch.dtype:
    wanted = plan.map.inference.dtype
    if wanted is not None and wanted != "auto":
        found: torch.dtype = getattr(torch, _DTYPES.get(wanted, wanted))
        return found
    stored = [one.format.parameters.dtype for one in plan.modules.values() if is_embedding(one.name)]
    return TORCH_DTYPES[stored[0]] if stored else torch.bfloat16


#: SGLang's short names.
_DTYPES = {"half": "float16", "float": "float32"}
