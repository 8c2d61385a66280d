"""Allocation ``uniform``: the same fraction of each role in every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pyprune.discovery.groups import Group
from pyprune.selection.allocation import Budget, last_at_least, nearest, register


@register("uniform", by_layer=False, scored=False)
def uniform(groups: Sequence[Group], scores: Mapping[str, np.ndarray], budget: Budget) -> dict[str, int]:
    """One fraction for all groups; scores decide nothing here.

    Heads are few, so a fraction of them is rarely whole. Every role but the finest is rounded towards keeping, and
    the finest role (the one whose step over all its groups removes the fewest parameters, as a rule FFN channels)
    takes up the difference, so that the total comes within one of its steps: one unit in every layer. Groups with
    equal units get equal widths.

    Where the finest role cannot take up the difference, the others go one step further if that comes nearer.
    """
    step: dict[str, int] = {}
    for g in groups:
        step[g.role] = step.get(g.role, 0) + budget.cost[g.name] * budget.limits[g.name].step
    finest = min(step, key=lambda role: step[role])
    fine = [g for g in groups if g.role == finest]
    coarse = [g for g in groups if g.role != finest]
    grid = max(g.units for g in fine)  # the common fraction is n / grid

    def coarse_widths(n: int) -> dict[str, int]:
        return {g.name: budget.limits[g.name].keeping(g.units - g.units * n // grid) for g in coarse}

    def fine_widths(n: int) -> dict[str, int]:
        return {g.name: budget.limits[g.name].nearest(g.units - (2 * g.units * n + grid) // (2 * grid)) for g in fine}

    common = last_at_least(grid, lambda n: budget.count(coarse_widths(n) | fine_widths(n)), budget.target)

    def filled(n: int) -> dict[str, int]:
        fixed = coarse_widths(n)
        return fixed | fine_widths(nearest(grid, lambda m: budget.count(fixed | fine_widths(m)), budget.target))

    widths = filled(common)
    if common < grid and budget.count(coarse_widths(common) | fine_widths(grid)) > budget.target:
        widths = min(widths, filled(common + 1), key=lambda w: abs(budget.count(w) - budget.target))
    return widths
