"""What the hooks of one process share. SGLang hands our loader and our quantization config no common object."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import EngineError

if TYPE_CHECKING:
    import torch

    from ..kernels.compressed import CompressedWeight
    from ..plan import Plan
    from .ledger import Ledger
    from .proof import Proof


@dataclass(slots=True)
class Loading:
    """One model while it loads: its plan, what is still expected, and the proof in the making."""

    plan: Plan
    ledger: Ledger
    proof: Proof
    #: Full checkpoint name -> the compressed weight, part and local name that wait for it.
    places: dict[str, tuple[CompressedWeight, int, str]] = field(default_factory=dict)

    def destination(self, name: str) -> torch.Tensor | None:
        """Where a tensor can be read to without a copy."""
        place = self.places.get(name)
        return place[0].destination(place[1], place[2]) if place else None


#: The model this process is loading, set by the loader and read by the quantization config.
loading: Loading | None = None
#: The proof of the model this process serves; None in the HTTP process.
proof: Proof | None = None
#: The HTTP process's TokenizerManager, through which it asks the schedulers.
tokenizer_manager: Any = None


def current_loading() -> Loading:
    """The load in progress; an error outside of one."""
    if loading is None:
        raise EngineError(
            "no mixed-precision load is in progress",
            rule="weights arrive through the mixed-precision loader only",
            remedy="restart the server instead of updating weights from disk",
        )
    return loading
