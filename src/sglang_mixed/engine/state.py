"""What the hooks of one process share. SGLang hands our loader and our quantization config no common object."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..errors import EngineError
from ..formats.base import TORCH_DTYPES
from ..formats.values import SCALES
from ..pages import populate
from ..plan.values import check_planned
from .loading.transfer import Transfer

if TYPE_CHECKING:
    from ..checkpoint import Read
    from ..plan import RankPlan
    from .loading.intake import Place
    from .loading.ledger import Ledger, Line
    from .loading.loader import MixedPrecisionLoader
    from .loading.proof import Proof
    from .serving.tracking import ExpertTracker


@dataclass(slots=True)
class Loading:
    """One model while it loads: this rank's plan, what is still expected, and the proof in the making."""

    plan: RankPlan
    ledger: Ledger
    proof: Proof
    #: Whether every weight is looked at for values that no weight may have; scales are in any case.
    verify_values: bool = False
    #: How bytes get into the parameters.
    transfer: Transfer = field(default_factory=Transfer)
    #: Full checkpoint name -> what waits for the tensor; all others go through SGLang's own loaders.
    places: dict[str, tuple[Line, Place]] = field(default_factory=dict)
    #: Full checkpoint name -> the parameter to whose first rows SGLang's loader copies the whole tensor.
    vocabularies: dict[str, torch.Tensor] = field(default_factory=dict)
    _partial: dict[str, torch.Tensor] = field(default_factory=dict)

    def expect(self, line: Line, name: str, place: Place) -> None:
        """A tensor will be delivered to this place."""
        self.ledger.expect(line, place.nbytes)
        self.places[name] = line, place

    def takes(self, read: Read) -> bool:
        """Whether a tensor has a place: what has none goes to SGLang's own loaders."""
        return read.name in self.places

    def is_only_codes(self, read: Read) -> bool:
        """Whether nothing but an e4m3 code that is no number could be wrong with a tensor's values."""
        return read.entry.dtype == "F8_E4M3" and read.name.rpartition(".")[2] not in SCALES

    def check(self, name: str, tensor: torch.Tensor) -> None:
        """Look at a tensor's values. Raises InvalidValueError for those that no weight may have."""
        if name in self.places and self.places[name][1].is_implied:
            return  # there it is compared as a whole
        check_planned(self.plan.plan, name, tensor, everything=self.verify_values)

    def destination(self, read: Read) -> torch.Tensor | None:
        """Where a tensor is to be read to."""
        shape, dtype = read.entry.shape, TORCH_DTYPES[read.entry.dtype]
        if read.name in self.places:
            place = self.places[read.name][1].destination()
            return self.transfer.memory(read.shape, dtype) if place is None else place
        if read.ranges is None:
            rows = self._rows(read)
            return self.transfer.memory(shape, dtype) if rows is None else rows
        # SGLang's loaders cut the whole tensor themselves: what they leave out is never read, nor touched in memory.
        whole = self.transfer.memory(shape, dtype)
        self._partial[read.name] = whole = torch.empty(shape, dtype=dtype) if whole is None else whole
        return whole[tuple(slice(*bounds) for bounds in read.ranges)]

    def _rows(self, read: Read) -> torch.Tensor | None:
        """A vocabulary's own rows, which its loader then copies to themselves: they need no memory besides."""
        parameter, shape = self.vocabularies.get(read.name), read.entry.shape
        if parameter is None or parameter.dtype != TORCH_DTYPES[read.entry.dtype]:
            return None
        rows = parameter[: shape[0]]
        return populate(rows) if rows.shape == shape else None

    def deliver(self, name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        """Give a tensor to its place; where there is none, what SGLang's loaders are to be given."""
        if name not in self.places:
            return self._partial.pop(name, tensor)
        line, place = self.places.pop(name)
        self.ledger.arrive(tensor.nbytes, line)
        place.receive(tensor)
        return None


#: Functions of SGLang that the plugin hooks into and that this version does not have.
missing: tuple[str, ...] = ()
#: The model this process is loading, set by the loader and read by the quantization config.
loading: Loading | None = None
#: The proof of the model this process serves; None in the HTTP process.
proof: Proof | None = None
#: What counts the tokens routed to that model's experts; None where nothing is counted.
tracker: ExpertTracker | None = None
#: What loaded a mix in this very process, without a server; None in all of a server's.
loader: MixedPrecisionLoader | None = None
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
