"""Allocation ``knapsack``: the widths whose removed units have the least total score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pyprune.discovery.groups import Group
from pyprune.selection.allocation import Budget, register
from pyprune.selection.global_ranking import FLOORS, remove_lowest


@register("knapsack", min_keep=FLOORS)
def knapsack(groups: Sequence[Group], scores: Mapping[str, np.ndarray], budget: Budget) -> dict[str, int]:
    """Minimise the sum of the scores that go, subject to the size.

    Scores are taken as they are, as costs in one currency: what a unit costs in one layer is compared with what it
    costs in another. That holds for the expected loss (``group_fisher``, ``param_second``) and for the share of the
    residual stream that is lost (``wanda``, ``flap``, ``obs`` with inverse token weights). For criteria without a
    common scale there is ``global``.

    A group's total cost is the sum over its lowest units, a convex function of the width, so that removing units by
    rising cost per parameter solves the relaxed problem exactly (Dantzig 1957): there is one price per parameter
    below which every unit goes.
    """
    lowest_first = [np.sort(scores[g.name], axis=1).sum(axis=0) for g in groups]
    values = [s / max(1, budget.cost[g.name]) for s, g in zip(lowest_first, groups, strict=True)]
    return remove_lowest(groups, values, budget)
