"""One checkpoint folder: headers first, weights on demand."""

from .checkpoint import Checkpoint, changed, open_checkpoint
from .opening import opened
from .reading import Piece, Ranges, Read, pieces, read_entries, read_entry, read_into, read_packed
from .shard import Entry, join

__all__ = [
    "Checkpoint",
    "Entry",
    "Piece",
    "Ranges",
    "Read",
    "changed",
    "join",
    "open_checkpoint",
    "opened",
    "pieces",
    "read_entries",
    "read_entry",
    "read_into",
    "read_packed",
]
