"""What the hooks of one process share. SGLang hands our loader and our quantization config no common object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import EngineError

if TYPE_CHECKING:
    from ..plan import Plan
    from .ledger import Ledger
    from .proof import Proof


@dataclass(slots=True)
class Loading:
    """One model while it loads: its plan, what is still expected, and the proof in the making."""

    plan: Plan
    ledger: Ledger
    proof: Proof


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
