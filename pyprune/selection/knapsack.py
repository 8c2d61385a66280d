"""Allocation ``knapsack``: the widths at which the layers lose least, told by the scores of the units that go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pyprune.discovery.groups import Group
from pyprune.selection.allocation import Budget, register
from pyprune.selection.global_ranking import FLOORS, remove_lowest

GROWTH = 1.5  # a layer's loss grows with this power of the scores that it loses


@register("knapsack", min_keep=FLOORS)
def knapsack(groups: Sequence[Group], scores: Mapping[str, np.ndarray], budget: Budget) -> dict[str, int]:
    """Minimise the sum over groups of (sum of the scores that go)^1.5, subject to the size.

    Scores are taken as they are, as costs in one currency: what a unit costs in one layer is compared with what it
    costs in another. That holds for the expected loss (``group_fisher``, ``param_second``) and for the share of the
    residual stream that is lost (``wanda``, ``flap``, ``obs`` with inverse token weights). For criteria without a
    common scale there is ``global``.

    A score is what a unit costs when it goes alone. The errors of units that go together from one layer add up to
    more, because their outputs are not independent: were they all alike, n of them would cost n^2 times one, were they
    orthogonal, n times. The power between the two is an empirical one.

    A group's cost is a convex function of its width, so that removing units by rising cost per parameter solves the
    relaxed problem exactly (Dantzig 1957): there is one price per parameter below which every unit goes.
    """
    values = []
    for g in groups:
        lost = np.cumsum(np.maximum(np.sort(scores[g.name], axis=1).sum(axis=0), 0.0)) ** GROWTH
        values.append(np.diff(lost, prepend=0.0) / max(1, budget.cost[g.name]))
    return remove_lowest(groups, values, budget)
