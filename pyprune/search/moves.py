"""Genomes, and steps between them that keep the size: widths of all groups, under a budget of parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random

import numpy as np

from pyprune.discovery.groups import Group
from pyprune.selection.allocation import ALLOCATIONS, Budget, nearest

Widths = dict[str, int]

PARTS = 32  # a step of scale 1 moves this part of a mean group's parameters
GRID = 10_000
MEASURED = ("uniform", "log_depth", "knapsack", "global")  # allocations that a search starts from


class Moves:
    """Changes of widths.

    Args:
        groups: those whose widths are searched.
        budget: what is to be met.

    Attributes:
        tolerance: parameters by which a genome may miss the target: half a step of the finest group, or what the
            nearest of the plain allocations misses it by.
    """

    def __init__(self, groups: Sequence[Group], budget: Budget) -> None:
        self.groups, self.budget = list(groups), budget
        self.step = {g.name: max(1, budget.cost[g.name] * budget.limits[g.name].step) for g in groups}
        self.tolerance = min(self.step.values()) / 2
        self._quantum = sum(budget.cost[g.name] * g.units for g in groups) / len(self.groups) / PARTS
        self.finest_first = sorted(self.groups, key=lambda g: self.step[g.name])

    def _cost(self, group: Group) -> int:
        return max(1, self.budget.cost[group.name])

    def miss(self, widths: Mapping[str, int]) -> int:
        """Parameters above the target."""
        return self.budget.count(widths) - self.budget.target

    def fits(self, widths: Mapping[str, int]) -> bool:
        """Whether the size is met."""
        return abs(self.miss(widths)) <= self.tolerance

    def moved(self, group: Group, width: float) -> int:
        """The allowed width nearest to ``width``."""
        limits = self.budget.limits[group.name]
        return limits.nearest(max(limits.least, min(group.units, round(width))))

    def mended(self, widths: Mapping[str, int], order: Sequence[Group]) -> Widths:
        """``widths`` with the groups in ``order``, one after the other, changed until the size is met, or as nearly
        as they can."""
        out = dict(widths)
        miss = self.miss(out)
        for group in order:
            if abs(miss) <= self.tolerance:
                break
            trial = {**out, group.name: self.moved(group, out[group.name] - miss / self._cost(group))}
            left = self.miss(trial)
            if abs(left) < abs(miss):
                out, miss = trial, left
        return out

    def mutated(self, widths: Mapping[str, int], rng: Random, scale: float) -> Widths | None:
        """One to three times: parameters move from one group to another. None where that led nowhere."""
        out = dict(widths)
        for _ in range(min(rng.randint(1, 3), rng.randint(1, 3))):
            donors = [g for g in self.groups if out[g.name] > self.budget.limits[g.name].least]
            takers = [g for g in self.groups if out[g.name] < g.units]
            if not donors or not takers:
                return None
            donor, taker = rng.choice(donors), rng.choice(takers)
            if donor is taker:
                continue
            amount = self._quantum * scale * 2 ** rng.uniform(-1, 1)
            amount = max(amount, self.step[donor.name], self.step[taker.name])
            out[donor.name] = self.moved(donor, out[donor.name] - amount / self._cost(donor))
            out = self.mended(out, [taker])
        if not self.fits(out):
            others = list(self.finest_first)
            rng.shuffle(others)
            others.sort(key=lambda g: self.step[g.name])
            out = self.mended(out, others)
        return out if out != dict(widths) and self.fits(out) else None

    def starts(self, scores: Mapping[str, np.ndarray]) -> dict[str, Widths]:
        """Name -> genome to start from; each meets the size, and no two are the same.

        The plain allocations, also with the dimensions of values whole where those are cut; widths that fall linearly
        with depth; first and last layers spared; and, where several roles are cut, the finest alone.
        """
        found = {name: ALLOCATIONS[name].allocate(self.groups, scores, self.budget) for name in MEASURED}
        found["linear"] = self._by_depth(self.groups, lambda depth: 0.5 + depth)
        found["spared_ends"] = self._by_depth(self.groups, lambda depth: float(0.1 < depth < 0.99))
        others = [g for g in self.groups if g.role != "vo_dim"]
        found |= {f"{n}, vo_dim whole": w for n, w in self._alone(others, MEASURED, scores).items()}
        fine = [g for g in self.groups if g.role == self.finest_first[0].role]
        alone = self._alone(fine, ("uniform", "log_depth", "knapsack"), scores)
        found |= {f"{n}, {fine[0].role} only": w for n, w in alone.items()}
        if alone:
            found[f"linear, {fine[0].role} only"] = self._by_depth(fine, lambda depth: 0.5 + depth)
        misses = {name: abs(self.miss(widths)) for name, widths in found.items() if name in MEASURED}
        self.tolerance = max(self.tolerance, min(misses.values()))
        out: dict[str, Widths] = {}
        for name, widths in found.items():
            mended = self.mended(widths, self.finest_first)
            if self.fits(mended) and mended not in out.values():
                out[name] = mended
        return out

    def _alone(
        self, groups: Sequence[Group], names: Sequence[str], scores: Mapping[str, np.ndarray]
    ) -> dict[str, Widths]:
        """What these allocations give where ``groups``, some of all, are cut and the others stay whole; empty where
        they cannot make up the size."""
        if not 0 < len(groups) < len(self.groups) or self.budget.count(self._least(groups)) > self.budget.target:
            return {}
        whole = {g.name: g.units for g in self.groups}
        return {name: whole | ALLOCATIONS[name].allocate(groups, scores, self.budget) for name in names}

    def _least(self, groups: Sequence[Group]) -> Widths:
        return {g.name: self.budget.limits[g.name].least for g in groups}

    def _by_depth(self, groups: Sequence[Group], profile: Callable[[float], float]) -> Widths:
        """Each of ``groups`` loses a fraction of its units in proportion to ``profile`` of its depth, 0 to 1."""
        last = max((g.layer for g in groups if g.layer is not None), default=0) or 1
        whole = {g.name: g.units for g in self.groups}

        def widths(n: int) -> Widths:
            lost = {g.name: n / GRID * 4 * profile((g.layer or 0) / last) for g in groups}
            return whole | {g.name: self.moved(g, g.units * (1 - lost[g.name])) for g in groups}

        return widths(nearest(GRID, lambda n: self.budget.count(widths(n)), self.budget.target))
