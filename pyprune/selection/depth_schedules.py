"""Allocations ``log_depth`` and ``linear_depth``: early layers lose less, by a fixed schedule. Scores decide nothing.

Errors of early layers pass through all others, and what they compute is used by all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import ceil, floor, log

import numpy as np

from pyprune.discovery.groups import Group
from pyprune.discovery.roles import HEADS
from pyprune.selection.allocation import Budget, last_at_least, nearest, register
from pyprune.selection.global_ranking import FLOORS

GRID = 100_000  # steps of the common factor
FIRST = 0.25  # what the first layer loses, as a fraction of what the last one loses
LESS = 2 / 3  # what heads lose, as a fraction of what the other units lose on average
SPARED_FIRST, SPARED_LAST = 0.25, 0.06  # of the layers, in which no head goes


@register("log_depth", min_keep=FLOORS, scored=False)
def log_depth(groups: Sequence[Group], scores: Mapping[str, np.ndarray], budget: Budget) -> dict[str, int]:
    """Layer i of L, counted from 1, loses a fraction of its channels in proportion to 0.25 + 0.75 log(i) / log(L).

    Heads lose two thirds of what channels lose on average, rounded down to whole heads, and none in the first quarter
    and the last layers. Where the fraction would pass what a group may lose, the group stays at its least width and
    the others lose more. The finest role makes up for what whole heads leave over.
    """
    return _scheduled(groups, budget, lambda i, n: log(i) / log(n) if n > 1 else 1.0)


@register("linear_depth", min_keep=FLOORS, scored=False)
def linear_depth(groups: Sequence[Group], scores: Mapping[str, np.ndarray], budget: Budget) -> dict[str, int]:
    """As :func:`log_depth`, with 0.25 + 0.75 (i - 1) / (L - 1)."""
    return _scheduled(groups, budget, lambda i, n: (i - 1) / (n - 1) if n > 1 else 1.0)


def _scheduled(groups: Sequence[Group], budget: Budget, rise: Callable[[int, int], float]) -> dict[str, int]:
    step: dict[str, int] = {}
    for g in groups:
        step[g.role] = step.get(g.role, 0) + budget.cost[g.name] * budget.limits[g.name].step
    finest = min(step, key=lambda role: step[role])
    count = 1 + max((g.layer for g in groups if g.layer is not None), default=0)
    shares = [FIRST + (1 - FIRST) * rise(i + 1, count) for i in range(count)]
    mean = sum(shares) / count
    first, last = ceil(SPARED_FIRST * count), count - ceil(SPARED_LAST * count)

    def lost(g: Group, n: int) -> float:
        """Fraction that goes; the largest ``n`` leaves nothing of any layer but for its limits."""
        i = count - 1 if g.layer is None else g.layer
        if g.role not in HEADS or finest in HEADS:
            return min(1.0, n / GRID * shares[i] / FIRST)
        if first <= i < last:
            return min(1.0, LESS * n / GRID * mean / FIRST)
        return max(0.0, 10 * n / GRID - 9)  # once everything else has gone as far as it may

    def coarse(n: int) -> dict[str, int]:
        return {
            g.name: budget.limits[g.name].keeping(g.units - floor(g.units * lost(g, n)))
            for g in groups
            if g.role != finest
        }

    def fine(n: int) -> dict[str, int]:
        return {
            g.name: budget.limits[g.name].nearest(round(g.units * (1 - lost(g, n)))) for g in groups if g.role == finest
        }

    def both(n: int) -> dict[str, int]:
        return coarse(n) | fine(n)

    common = last_at_least(GRID, lambda n: budget.count(both(n)), budget.target)
    # A common factor short of the target may still leave too much to the finest role: then heads go one step further.
    tried = []
    for n in (common, _next_step(common, coarse)):
        fixed = coarse(n)
        finer = partial(_joined, fixed, fine)
        tried.append(finer(nearest(GRID, lambda m, finer=finer: budget.count(finer(m)), budget.target)))  # type: ignore[misc]
    missed = [abs(budget.count(w) - budget.target) for w in tried]
    return tried[0] if missed[0] <= max(missed[1], step[finest]) else tried[1]


def _joined(fixed: dict[str, int], fine: Callable[[int], dict[str, int]], n: int) -> dict[str, int]:
    return fixed | fine(n)


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
