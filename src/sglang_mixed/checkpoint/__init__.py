"""One checkpoint folder: headers first, weights on demand."""

from .checkpoint import Checkpoint, changed, join, open_checkpoint
from .header import Entry
from .opening import opened
from .reading import Ranges, Read, read_entries, read_entry, read_into

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
]
