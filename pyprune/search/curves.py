"""Allocation ``divergence``: every group measured alone at several widths, and a knapsack over what was measured.

One width is to be chosen for each group so that the sum of the divergences is least within a budget: a multiple-choice
knapsack. Its linear relaxation (Sinha and Zoltners 1979) needs of each group the widths on the lower convex hull of
(units removed, divergence) only, and takes the hulls' pieces by rising divergence per cost. Between two measured widths
the hull is the divergence, so that a budget is met within a unit.

Divergences of groups that were cut alone are added as if the groups did not know of each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from pyprune import progress as bars
from pyprune.discovery.groups import Group
from pyprune.search.fitness import Fitness, check_finite
from pyprune.selection.allocation import Budget, Limits
from pyprune.selection.global_ranking import remove_lowest

LEVELS = 6  # widths at which a group is measured, at most
BROKEN = 1e6  # nats: what counts for a model that gives NaN

Curve = list[tuple[int, float]]  # (width, nats a token), the widest first


def levels(units: int, limits: Limits) -> list[int]:
    """Allowed widths below ``units``, evenly spread down to the least, the widest first."""
    count = min(LEVELS, units - limits.least)
    wanted = (units - (units - limits.least) * (k + 1) / count for k in range(count))
    return sorted({limits.nearest(round(w)) for w in wanted} - {units}, reverse=True)


def measure_curves(groups: Sequence[Group], budget: Budget, fitness: Fitness) -> dict[str, Curve]:
    """Group name -> how far the model is from the dense one with that group alone cut, by what more it is than without
    (groups in ``budget.kept`` have their widths all along). On the first half of the held-out steps.

    Raises:
        PyPruneError: the divergence without is not finite.
    """
    last = (len(fitness.steps) + 1) // 2
    tokens = sum(fitness.tokens[:last])
    fitness.rebase(dict(budget.kept))
    start = fitness.total(budget.kept, 0, last) / tokens
    check_finite(start)
    curves: dict[str, Curve] = {}
    wanted = {g.name: levels(g.units, budget.limits[g.name]) for g in groups}
    with bars.bar("measuring widths", sum(map(len, wanted.values()))) as bar:
        for name, widths in wanted.items():
            curves[name] = []
            for width in widths:
                found = fitness.total({**budget.kept, name: width}, 0, last) / tokens
                curves[name].append((width, max(0.0, found - start) if math.isfinite(found) else BROKEN))
                bar.advance()
    return curves


def allocate_by_curves(groups: Sequence[Group], curves: Mapping[str, Curve], budget: Budget) -> dict[str, int]:
    """Widths of least total divergence within the budget."""
    values = [unit_prices(g.units, curves[g.name]) / max(1, budget.cost[g.name]) for g in groups]
    return remove_lowest(groups, values, budget)


def unit_prices(units: int, curve: Curve) -> np.ndarray:
    """Ascending, float64 [units]: what the first unit that goes adds to the divergence, the second, and so on."""
    hull = [(0, 0.0)]
    for removed, value in ((units - width, kl) for width, kl in curve):
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], (removed, value)):
            hull.pop()
        hull.append((removed, value))
    out = np.empty(units)
    for a, b in pairwise(hull):
        out[a[0] : b[0]] = _slope(a, b)
    out[hull[-1][0] :] = BROKEN if len(hull) == 1 else max(BROKEN, out[hull[-1][0] - 1])
    return out


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
