"""From a map and its sources to a Plan: what comes from where, checked before a weight byte is read."""

from .make import make_plan
from .plan import Plan, PlannedModule, Row
from .rank import Part, Rank, RankPlan

__all__ = ["Part", "Plan", "PlannedModule", "Rank", "RankPlan", "Row", "make_plan"]
