"""One checkpoint folder: headers first, weights on demand."""

from .checkpoint import Checkpoint, join, open_checkpoint
from .header import Entry
from .reading import Ranges, Read, opened, read_entries, read_entry, read_into

__all__ = [
    "Checkpoint",
    "Entry",
    "Ranges",
    "Read",
    "join",
    "open_checkpoint",
    "opened",
    "read_entries",
    "read_entry",
    "read_into",
]
