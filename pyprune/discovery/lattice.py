"""From resolved axes to positions: where each leaf lies along a tensor's dimension."""

from __future__ import annotations

from dataclasses import dataclass

from pyprune.discovery import axes as ax
from pyprune.discovery.axes import Axis
from pyprune.discovery.groups import Lattice


@dataclass(frozen=True)
class Occurrence:
    """One place of a leaf in a dimension: ``offset + u * stride``, repeated over the factors it stands with.

    Attributes:
        leaf: the atom.
        offset: position of its first unit.
        stride: distance of two units.
        spread: (count, stride, atom) of every factor beside it; atom is None where the factor is a concatenation.
    """

    leaf: Axis
    offset: int
    stride: int
    spread: tuple[tuple[int, int, Axis | None], ...] = ()

    @property
    def companions(self) -> frozenset[int]:
        """Identities of the atoms it stands in a product with."""
        return frozenset(id(a) for _, _, a in self.spread if a is not None)

    @property
    def square(self) -> bool:
        """It stands in a product with itself: removing a unit would not remove a lattice."""
        return id(self.leaf) in self.companions


class Occurrences:
    """Occurrences by resolved axis, computed once for every node; valid only when nothing is unified any more."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Occurrence, ...]] = {}

    def of(self, axis: Axis) -> tuple[Occurrence, ...]:
        """Every leaf below ``axis`` with its place; size-one axes have none."""
        node = ax.find(axis)
        found = self._known.get(id(node))
        if found is None:
            found = self._known[id(node)] = tuple(self._compute(node))
        return found

    def _compute(self, node: Axis) -> list[Occurrence]:
        if node.size <= 1:
            return []
        if node.kind == ax.ATOM:
            return [Occurrence(node, 0, 1)]
        out: list[Occurrence] = []
        if node.kind == ax.CONCAT:
            offset = 0
            for seg in ax.segments(node):
                out += [Occurrence(o.leaf, o.offset + offset, o.stride, o.spread) for o in self.of(seg)]
                offset += seg.size
            return out
        factors = ax.factors(node)
        strides = [1] * len(factors)
        for i in range(len(factors) - 2, -1, -1):
            strides[i] = strides[i + 1] * factors[i + 1].size
        beside = [(f.size, s, f if f.kind == ax.ATOM else None) for f, s in zip(factors, strides, strict=True)]
        for i, factor in enumerate(factors):
            others = tuple(b for j, b in enumerate(beside) if j != i)
            for o in self.of(factor):
                own = tuple((c, s * strides[i], a) for c, s, a in o.spread)
                out.append(Occurrence(o.leaf, o.offset * strides[i], o.stride * strides[i], own + others))
        return out


def lattice(occurrence: Occurrence, outer: Axis | None) -> Lattice:
    """The occurrence as a term; ``outer`` is the companion whose index chooses units separately."""
    outer_stride = 0
    spread: list[tuple[int, int]] = []
    for count, stride, other in occurrence.spread:
        if outer is not None and other is outer and outer_stride == 0:
            outer_stride = stride
        else:
            spread.append((count, stride))
    merged: list[tuple[int, int]] = []
    for count, stride in sorted(spread, key=lambda item: item[1]):
        if merged and stride == merged[-1][0] * merged[-1][1]:
            merged[-1] = (merged[-1][0] * count, merged[-1][1])
        else:
            merged.append((count, stride))
    return Lattice(occurrence.offset, outer_stride, occurrence.stride, tuple(reversed(merged)))
