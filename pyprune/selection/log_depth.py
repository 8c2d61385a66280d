"""Allocation ``log_depth``: early layers lose less, by a fixed schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import ceil, log

import numpy as np

from pyprune.discovery.groups import Group
from pyprune.selection.allocation import Budget, last_at_least, nearest, register
from pyprune.selection.global_ranking import FLOORS

GRID = 100_000  # steps of the common factor


@register("log_depth", min_keep=FLOORS)
def log_depth(groups: Sequence[Group], scores: Mapping[str, np.ndarray], budget: Budget) -> dict[str, int]:
    """The i-th layer, counted from 1, loses a fraction of its units in proportion to log(1 + i).

    Errors of early layers pass through all others, and what they compute is used by all of them. Scores decide
    nothing here. Where the fraction would pass what a group may lose, the group stays at its least width and the others
    lose more. As in ``uniform``, the finest role makes up for what whole heads leave over.
    """
    step: dict[str, int] = {}
    for g in groups:
        step[g.role] = step.get(g.role, 0) + budget.cost[g.name] * budget.limits[g.name].step
    finest = min(step, key=lambda role: step[role])
    last = max((g.layer for g in groups if g.layer is not None), default=0)

    def share(g: Group, n: int) -> float:
        """Fraction that stays; the largest ``n`` leaves nothing of any layer but for its limits."""
        return 1 - min(1.0, n / GRID * log(2 + (last if g.layer is None else g.layer)) / log(2))

    def coarse(n: int) -> dict[str, int]:
        return {g.name: budget.limits[g.name].keeping(ceil(g.units * share(g, n))) for g in groups if g.role != finest}

    def fine(n: int) -> dict[str, int]:
        return {g.name: budget.limits[g.name].nearest(round(g.units * share(g, n))) for g in groups if g.role == finest}

    common = last_at_least(GRID, lambda n: budget.count(coarse(n) | fine(n)), budget.target)
    # A common factor short of the target may still leave too much to the finest role: then heads go one step further.
    tried = []
    for n in (common, _next_step(common, coarse)):
        fixed = coarse(n)
        best = nearest(GRID, lambda m, fixed=fixed: budget.count(fixed | fine(m)), budget.target)  # type: ignore[misc]
        tried.append(fixed | fine(best))
    return min(tried, key=lambda w: abs(budget.count(w) - budget.target))


def _next_step(n: int, coarse: Callable[[int], dict[str, int]]) -> int:
    """The first factor after ``n`` at which a coarse width changes; ``n`` when none does."""
    now = coarse(n)
    low, high = n, GRID
    if coarse(high) == now:
        return n
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if coarse(middle) == now else (low, middle)
    return high
