"""What the experts do: counts of the tokens routed to each, as values, files, tables and pictures."""

from .counts import ExpertCounts
from .export import ExpertExport, merge
from .files import read_export, write_export
from .formats import ExpertFormats, expert_formats
from .report import nothing_counted, report
from .tracker import ExpertActivationTracker

__all__ = [
    "ExpertActivationTracker",
    "ExpertCounts",
    "ExpertExport",
    "ExpertFormats",
    "expert_formats",
    "merge",
    "nothing_counted",
    "read_export",
    "report",
    "write_export",
]
