"""`EnhancedModelLoader`: a map, loaded into a torch model without an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from ..config import load_map
from ..errors import EngineError
from ..experts import ExpertActivationTracker
from ..experts.tracker import share_tracker
from ..plan import Plan, make_plan
from .cache import DequantizationCache
from .model import load_plan, memory_stats
from .tracking import track_experts


class EnhancedModelLoader:
    """Loads the mix that a map describes into models, and counts the experts they choose.

    `cache_bytes` bounds the dequantized weights that are kept for speed; 0 keeps none.

    >>> loader = EnhancedModelLoader("mix.yaml")                                                 # doctest: +SKIP
    >>> with torch.device("meta"):                                                               # doctest: +SKIP
    ...     model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained("Qwen3-30B-A3B"))
    >>> loader.load_model(model)["memory_saved_mb"]                                              # doctest: +SKIP
    34012.5
    """

    def __init__(self, config_path: str | Path, enable_expert_tracking: bool = True, *, cache_bytes: int = 0) -> None:
        self.map = load_map(config_path)
        self.cache = DequantizationCache(cache_bytes) if cache_bytes else None
        self._tracker = ExpertActivationTracker() if enable_expert_tracking else None
        self._hooks: list[RemovableHandle] = []
        self._loaded: tuple[torch.nn.Module, Plan] | None = None

    def load_model(
        self,
        model: torch.nn.Module,
        enable_moe_tracking: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> dict[str, Any]:
        """Fill a model whose parameters have the checkpoints' names; see `load_plan` for device, dtype and errors.

        Returns `loaded` (modules), `by_format`, `bytes` in memory, `saved` bytes against 16 bits, `seconds`, and more
        (`LoadReport.to_dict`).
        """
        plan = make_plan(self.map)
        report = load_plan(model, plan, device=device, dtype=dtype, cache=self.cache)
        self._loaded = model, plan
        if self._tracker is not None and enable_moe_tracking:
            for hook in self._hooks:
                hook.remove()
            self._hooks = track_experts(model, self._tracker)
            share_tracker(self._tracker)
        return report.to_dict()

    def get_memory_stats(self) -> dict[str, Any]:
        """`memory_stats` of the model that was loaded last. Raises EngineError before one was."""
        if self._loaded is None:
            raise EngineError("no model is loaded", remedy="call load_model first")
        return memory_stats(*self._loaded)

    def get_expert_tracker(self) -> ExpertActivationTracker | None:
        """The tracker; None where tracking is off."""
        return self._tracker

    def get_expert_stats(self, layer_id: int | None = None, expert_id: int | None = None) -> dict[str, Any]:
        """As `ExpertActivationTracker.get_expert_stats`. Raises EngineError where tracking is off."""
        return self._active_tracker().get_expert_stats(layer_id, expert_id)

    def get_top_experts(self, top_k: int = 10) -> list[dict[str, Any]]:
        """The most activated experts first. Raises EngineError where tracking is off."""
        return self._active_tracker().get_top_experts(top_k)

    def get_layer_stats(self) -> dict[int, dict[str, Any]]:
        """Layer -> totals and experts. Raises EngineError where tracking is off."""
        return self._active_tracker().get_layer_stats()

    def reset_expert_stats(self) -> None:
        """Start counting from nothing. Raises EngineError where tracking is off."""
        self._active_tracker().reset_stats()

    def export_expert_stats(self, file_path: str | Path) -> None:
        """Write the counts as JSON, whole or not at all. Raises EngineError as above, ExpertExportError."""
        self._active_tracker().export_stats(file_path)

    def _active_tracker(self) -> ExpertActivationTracker:
        if self._tracker is None:
            raise EngineError(
                "experts are not counted", remedy="create EnhancedModelLoader(..., enable_expert_tracking=True)"
            )
        return self._tracker


def load_model_with_enhanced_features(
    model: torch.nn.Module, config_path: str | Path, enable_expert_tracking: bool = True
) -> dict[str, Any]:
    """Load a map into a model; what `EnhancedModelLoader.load_model` returns, and the `loader` itself."""
    loader = EnhancedModelLoader(config_path, enable_expert_tracking)
    return {**loader.load_model(model, enable_expert_tracking), "loader": loader}
