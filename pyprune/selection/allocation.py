"""The seam for allocations: how much of each group stays, under a budget. Which units stay is decided elsewhere.

An allocation is one function in one file, registered by name::

    @register("half")
    def half(groups, scores, budget):
        return {g.name: budget.limits[g.name].nearest(g.units // 2) for g in groups}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from pyprune.discovery.groups import Group


@dataclass(frozen=True)
class Limits:
    """The widths that a group may take: all of its units, or a multiple of ``step`` that is at least ``floor``."""

    units: int
    floor: int = 1
    step: int = 1

    @property
    def least(self) -> int:
        """The smallest width."""
        return min(self.units, -(-self.floor // self.step) * self.step)

    def keeping(self, width: int) -> int:
        """The smallest allowed width that is at least ``width``."""
        return max(self.least, min(self.units, -(-width // self.step) * self.step))

    def nearest(self, width: int) -> int:
        """The allowed width nearest to ``width``; of two equally near ones the larger."""
        above, below = self.keeping(width), max(self.least, width // self.step * self.step)
        return below if width - below < above - width else above


@dataclass(frozen=True)
class Budget:
    """What an allocation has to meet.

    Attributes:
        target: parameters that shall be left.
        count: widths of the groups at hand -> parameters left (the whole model's; exact; never rises when a width
            falls).
        limits: group name -> widths it may take.
        cost: group name -> parameters that leave with one unit (of each copy) when nothing else is cut.
        kept: widths that were decided before, of other groups.
    """

    target: int
    count: Callable[[Mapping[str, int]], int]
    limits: Mapping[str, Limits]
    cost: Mapping[str, int]
    kept: Mapping[str, int] = field(default_factory=dict)


Allocate: TypeAlias = Callable[[Sequence[Group], Mapping[str, np.ndarray], Budget], dict[str, int]]


@dataclass(frozen=True)
class Allocation:
    """A registered allocation.

    Attributes:
        name: what ``select(allocation=...)`` is given.
        allocate: (groups, group name -> float64 scores [outer, units], budget) -> group name -> units kept per copy.
        by_layer: True where layers end up with different widths; ``widths=`` are then means over the layers.
        min_keep: role -> fraction of the units that stays in every group unless the user says otherwise (one unit
            else).
        scored: False where scores say which units go, and nothing about how many.
    """

    name: str
    allocate: Allocate
    by_layer: bool
    min_keep: Mapping[str, float] = field(default_factory=dict)
    scored: bool = True


ALLOCATIONS: dict[str, Allocation] = {}


def register(
    name: str, *, by_layer: bool = True, min_keep: Mapping[str, float] | None = None, scored: bool = True
) -> Callable[[Allocate], Allocate]:
    """Decorator: make a function available as ``select(allocation=name)``."""

    def add(allocate: Allocate) -> Allocate:
        if name in ALLOCATIONS:
            raise ValueError(f"an allocation named {name!r} is registered already")
        ALLOCATIONS[name] = Allocation(name, allocate, by_layer, dict(min_keep or {}), scored)
        return allocate

    return add


def last_at_least(end: int, count: Callable[[int], int], target: int) -> int:
    """The largest ``n`` in ``0..end`` with ``count(n) >= target``, else 0; ``count`` never rises."""
    low, high = 0, end
    while low < high:
        middle = (low + high + 1) // 2
        if count(middle) >= target:
            low = middle
        else:
            high = middle - 1
    return low


def nearest(end: int, count: Callable[[int], int], target: int) -> int:
    """The ``n`` in ``0..end`` whose ``count(n)`` is nearest to ``target``; of two equally near ones the smaller."""
    n = last_at_least(end, count, target)
    if n < end and target - count(n + 1) < count(n) - target:
        return n + 1
    return n
