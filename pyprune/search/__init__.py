"""Searching for how many units each layer keeps: the allocation ``search``."""

from pyprune.search.plan import search_plan

__all__ = ["search_plan"]
