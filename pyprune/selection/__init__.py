"""Selection: scores and a budget in, a plan out."""

from pyprune.selection.compose import compose
from pyprune.selection.plan import Cut, Plan
from pyprune.selection.select import select

__all__ = ["Cut", "Plan", "compose", "select"]
