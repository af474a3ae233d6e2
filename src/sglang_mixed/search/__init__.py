"""The best mix for a budget: an integer program over units and sources, the map it makes, and a picture."""

from .budget import Budget, parse_bytes
from .mapping import map_text
from .mix import Mix, Point, Search
from .use import weighted_errors

__all__ = ["Budget", "Mix", "Point", "Search", "map_text", "parse_bytes", "weighted_errors"]
