"""What the experts do: counts of the tokens routed to each, as values, files, tables and pictures."""

from .counts import ExpertCounts

__all__ = ["ExpertCounts"]
