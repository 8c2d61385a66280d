"""Allocation ``descent``: the best of the plain allocations, then widths moved along slopes measured around it.

A round measures every group a little wider and a little narrower, all others as the plan has them. What that does to
the divergence is taken for additive over groups as long as no width moves further, and the widths of least total
divergence within the budget are those that give up units in order of their price: a knapsack whose solution has equal
slopes wherever no limit binds (Everett 1963). Slopes are those around the plan, not around the dense model: errors of
layers that are cut together add up to more than those of each alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from pyprune import progress as bars
from pyprune.discovery.groups import Group
from pyprune.search.curves import BROKEN, Curve
from pyprune.search.evolution import Measure
from pyprune.search.fitness import check_finite, figure
from pyprune.search.moves import Moves, Widths
from pyprune.selection.global_ranking import remove_lowest

ROUNDS = 4  # at most
WORTH = 0.03  # by how much of the divergence a round must have lowered it for another to follow
REACH = 0.1  # of a group's units: how far a round moves a width at most


def descend(
    moves: Moves, measure: Measure, starts: Mapping[str, Widths], anchor: Widths
) -> tuple[Widths, dict[str, Any]]:
    """Widths of least divergence that at most :data:`ROUNDS` rounds find, and what a report says of the way there.

    No round makes it worse: what does not lower the divergence on all held-out tokens is tried at half of the way,
    and then ends the descent. So does a round that lowers it by less than :data:`WORTH`.

    Args:
        moves: the groups and their budget.
        measure: what is minimised.
        starts: name -> widths to start from; the best on half of the tokens is taken.
        anchor: widths where these are measured exactly.

    Raises:
        PyPruneError: no start's divergence is finite.
    """
    started = time.monotonic()
    screen, last = (len(measure.steps) + 1) // 2, len(measure.steps)
    tokens = sum(measure.tokens)
    rounds: list[dict[str, Any]] = []

    def settle(widths: Widths) -> float:
        """Measure around ``widths`` from now on; their divergence, nats a token."""
        measure.anchor(widths)
        measure.rebase(widths)
        return measure.total(widths, 0, last) / tokens

    def mark(kl: float) -> None:
        rounds.append({"divergence": kl, "seconds": round(time.monotonic() - started, 1)})

    measure.anchor(anchor)
    tried = {
        name: measure.total(widths, 0, screen) / sum(measure.tokens[:screen])
        for name, widths in bars.track(list(starts.items()), "first candidates")
    }
    best, kl = dict(anchor), math.inf
    for name in sorted(tried, key=lambda name: _finite(tried[name])):
        best = dict(starts[name])
        kl = settle(best)
        if math.isfinite(kl):  # with refits of its own, too
            break
    check_finite(kl)
    mark(kl)
    for number in range(1, ROUNDS + 1):
        prices = []
        for group in bars.track(moves.groups, f"measuring slopes, round {number}"):
            around: Curve = [
                (width, _finite(measure.total({**best, group.name: width}, 0, last) / tokens) - kl)
                for width in neighbours(moves, group, best[group.name])
            ]
            prices.append(prices_around(group.units, best[group.name], around) / max(1, moves.budget.cost[group.name]))
        whole = moves.mended(remove_lowest(moves.groups, prices, moves.budget), moves.finest_first)
        half = moves.mended({n: round((best[n] + w) / 2) for n, w in whole.items()}, moves.finest_first)
        better = next((w for w in (whole, half) if moves.fits(w) and measure.total(w, 0, last) / tokens < kl), None)
        if better is None:
            break
        found = settle(better)
        if not found < kl:
            break
        worth = found < (1 - WORTH) * kl
        best, kl = better, found
        mark(kl)
        if not worth:
            break
    told = {name: figure(value) for name, value in tried.items()}
    return best, {"divergence": kl, "starts": told, "rounds": rounds, "seconds": round(time.monotonic() - started, 1)}


def neighbours(moves: Moves, group: Group, width: int) -> list[int]:
    """The allowed widths at which a group of ``width`` is measured: one wider, one narrower, where there are such."""
    reach = max(1, moves.budget.limits[group.name].step, round(REACH * group.units))
    return sorted({moves.moved(group, width + reach), moves.moved(group, width - reach)} - {width}, reverse=True)


def prices_around(units: int, width: int, around: Curve) -> np.ndarray:
    """Ascending, float64 [units]: what each unit that goes adds to the divergence, the first to go first.

    Between the widths that were measured the divergence is p u + q u^2, u units narrower than ``width``, through both
    neighbours, so that a group may move by any part of the way; a straight line where it curves downwards, or where
    there is one neighbour only. Units beyond the widest width measured are free, those below the narrowest cost more
    than all others: neither limit is passed.

    Args:
        around: (width, divergence above that at ``width``) of the neighbours.
    """
    points = sorted((width - w, value) for w, value in around)
    out = np.full(units, BROKEN)
    if not points:
        return out
    if len(points) == 1:
        p, q = points[0][1] / points[0][0], 0.0
    else:
        (a, at_a), (b, at_b) = points
        q = (at_b / b - at_a / a) / (b - a)
        p = at_a / a - q * a
        if q < 0:
            p, q = (at_b - at_a) / (b - a), 0.0
    first, end = min(0, points[0][0]), max(0, points[-1][0])
    out[: units - width + first] = -BROKEN
    steps = np.arange(first, end)
    out[units - width + steps] = p + q * (2 * steps + 1)
    return out


def _finite(value: float) -> float:
    return value if math.isfinite(value) else BROKEN
