"""One checkpoint folder: headers first, weights on demand."""

from .checkpoint import Checkpoint, changed, open_checkpoint
from .opening import opened
from .reading import Ranges, Read, read_entries, read_entry, read_into, read_packed
from .shard import Entry, join

__all__ = [
    "Checkpoint",
    "Entry",
    "Ranges",
    "Read",
    "changed",
    "join",
    "open_checkpoint",
    "opened",
    "read_entries",
    "read_entry",
    "read_into",
    "read_packed",
]
