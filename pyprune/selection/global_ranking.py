"""Allocation ``global``: one ranking over the whole model, heads and channels together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pyprune.discovery.groups import Group
from pyprune.selection.allocation import Budget, last_at_least, nearest, register

# Fractions that stay in every group unless the user says otherwise. Heads and layers keep at least one; a router needs
# several experts to choose from.
CHANNELS = ("ffn", "expert_ffn", "qk_dim", "vo_dim", "latent", "state", "hidden", "channels")
FLOORS = {**dict.fromkeys(CHANNELS, 0.1), "experts": 0.25}


@register("global", min_keep=FLOORS)
def global_ranking(groups: Sequence[Group], scores: Mapping[str, np.ndarray], budget: Budget) -> dict[str, int]:
    """Remove the units of least comparable importance (:func:`comparable`) until the size is met.

    A unit of a group with several copies is one unit in each copy, so that all copies keep the same number: the k-th
    lowest of every copy go together, ranked by their mean. Dead ties spread evenly.
    """
    return remove_lowest(groups, comparable(groups, scores, budget.cost), budget)


def remove_lowest(groups: Sequence[Group], values: Sequence[np.ndarray], budget: Budget) -> dict[str, int]:
    """Widths when units go in the order of ``values``, one ascending array [units] a group, until the size is met.

    Of equal values those go first whose group has lost the smaller part; then the earlier group. What is left of the
    size where the next unit is too large goes in the same order, of the finest units alone.
    """
    removable = [g.units - budget.limits[g.name].least for g in groups]
    owner = np.repeat(np.arange(len(groups)), removable)
    value = np.concatenate([v[:n] for v, n in zip(values, removable, strict=True)])
    lost = np.concatenate([np.arange(1, n + 1) / g.units for g, n in zip(groups, removable, strict=True)])
    ranked = owner[np.lexsort((lost, value))]

    def widths(gone: np.ndarray) -> dict[str, int]:
        counts = np.bincount(gone, minlength=len(groups)).tolist()
        return {g.name: budget.limits[g.name].nearest(g.units - k) for g, k in zip(groups, counts, strict=True)}

    def count(gone: np.ndarray) -> int:
        return budget.count(widths(gone))

    steps = np.array([budget.cost[g.name] * budget.limits[g.name].step for g in groups])
    first = last_at_least(len(ranked), lambda n: count(ranked[:n]), budget.target)
    rest = ranked[first:][(steps == steps.min())[ranked[first:]]]
    more = nearest(len(rest), lambda n: count(np.append(ranked[:first], rest[:n])), budget.target)
    ways = (np.append(ranked[:first], rest[:more]), ranked[: first + 1])
    return widths(min(ways, key=lambda gone: abs(count(gone) - budget.target)))


def comparable(groups: Sequence[Group], scores: Mapping[str, np.ndarray], cost: Mapping[str, int]) -> list[np.ndarray]:
    r"""Scores that can be ranked across roles and layers: one ascending float64 array [units] per group.

    Heads and channels differ in two things. A head has a hundred times the parameters, so what is compared is
    importance *per parameter*, s / p: removing in that order loses the least importance for a number of parameters
    (the greedy solution of the knapsack). And criteria are on different scales in different places, so that density
    is divided by the mean density of its surroundings,

        value_u = (s_u / p_g) / sqrt(D_role * D_group),    D_X = (sum of s over X) / (sum of p over X).

    D_role makes roles alike: each is taken to carry importance in proportion to its parameters, and scaling all
    scores of a role changes nothing. D_group would make layers alike too, so that every layer loses about the same;
    leaving it out trusts the scale of gradients at different depths. The geometric mean of the two goes half way.

    Why not z-scores in each layer and role, (s - mean) / std, as FLAP has it (An et al., 2024, section 4.2)? With few
    heads in a layer the worst always stands near -1, while the channels' distribution has its tail on the right and
    little below -1: heads go first whatever they are worth.

    Negative scores are shifted, by role, to start at zero: the formula is for magnitudes.
    """
    shift: dict[str, float] = {}
    for g in groups:
        shift[g.role] = min(shift.get(g.role, 0.0), float(scores[g.name].min()))
    lowest_first = [np.sort(scores[g.name], axis=1).mean(axis=0) - shift[g.role] for g in groups]
    unit_size = [max(1, cost[g.name]) for g in groups]
    total: dict[str, float] = {}
    size: dict[str, int] = {}
    for g, s, p in zip(groups, lowest_first, unit_size, strict=True):
        total[g.role] = total.get(g.role, 0.0) + float(s.sum())
        size[g.role] = size.get(g.role, 0) + g.units * p
    out = []
    for g, s, p in zip(groups, lowest_first, unit_size, strict=True):
        surroundings = np.sqrt(total[g.role] / size[g.role]) * np.sqrt(s.mean() / p)
        out.append(s / p / surroundings if surroundings > 0 else np.zeros_like(s))
    return out
