"""The best mix for a budget: an integer program over units and sources, the map it makes, and a picture."""

from .budget import Budget
from .mapping import map_text, resolves_to
from .mix import Mix, Point, Search
from .use import weighted_errors

__all__ = ["Budget", "Mix", "Point", "Search", "map_text", "resolves_to", "weighted_errors"]
