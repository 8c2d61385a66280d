"""Allocation ``log_depth``: early layers lose less, by a fixed schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log

import numpy as np

from pyprune.discovery.groups import Group
from pyprune.selection.allocation import Budget, nearest, register
from pyprune.selection.global_ranking import FLOORS

GRID = 100_000  # steps of the common factor


@register("log_depth", min_keep=FLOORS)
def log_depth(groups: Sequence[Group], scores: Mapping[str, np.ndarray], budget: Budget) -> dict[str, int]:
    """The i-th layer, counted from 1, loses a fraction of its units in proportion to log(1 + i).

    Errors of early layers pass through all others, and what they compute is used by all of them. Scores decide
    nothing here. Where the fraction would pass what a group may lose, the group stays at its least width and the others
    lose more.
    """
    depth = _depths(groups)

    def widths(n: int) -> dict[str, int]:
        out = {}
        for g in groups:
            limit = budget.limits[g.name]
            # The first layers weigh least; a factor up to 1 / their weight reaches every limit.
            factor = n / GRID / log(2)
            lost = min(1.0, factor * log(1 + depth[g.name]))
            out[g.name] = limit.nearest(round(g.units * (1 - lost)))
        return out

    return widths(nearest(GRID, lambda n: budget.count(widths(n)), budget.target))


def _depths(groups: Sequence[Group]) -> dict[str, int]:
    """Group name -> number of its layer, from 1; a group outside of layers counts as the last."""
    last = max((g.layer for g in groups if g.layer is not None), default=0)
    return {g.name: 1 + (last if g.layer is None else g.layer) for g in groups}
