"""Parameters, or what else a budget is in, as a function of widths: counted before any unit is chosen.

One dimension of a tensor may be cut by several groups: the rows of a query projection by KV heads, by query heads and
by query-key dimensions at once. Its positions fall into *regions*, a region being the positions that the same groups
touch. In a region the units of different groups are crossed with each other (discovery refines axes into products),
so that a region of ``n`` positions keeps ``n * prod(kept_g / units_g)`` of them, whichever units are chosen. A tensor
keeps the product over its dimensions, the model the sum over its tensors. All in integers.

Another quantity than parameters (:class:`pyprune.selection.quantities.Quantity`) weighs the tensors, and adds what lies
in none of them, such as a cache, in the form of tensors too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import prod

import numpy as np

from pyprune.discovery.groups import Group, Groups, IndexMap
from pyprune.selection.quantities import Quantity

# A region: its number of positions, the groups that cut it (as numbers), the product of those groups' units.
Region = tuple[int, tuple[int, ...], int]


@dataclass(frozen=True)
class _Tensor:
    """What one parameter tensor keeps: ``whole`` elements in uncut dimensions times, per cut dimension, its regions;
    each element counts ``weight``.

    ``layer`` is (number of the ``layers`` group, unit) for a tensor inside a removable layer, else None.
    """

    whole: int
    dims: tuple[tuple[Region, ...], ...]
    layer: tuple[int, int] | None
    weight: Fraction = Fraction(1)


class Accounting:
    """Counts the parameters that given widths leave, exactly as :meth:`Plan.new_shapes` would, or another quantity.

    Args:
        groups: the model's groups.
        cut: those whose widths vary; all others stay whole.
        first_to_go: name of each group of role ``layers`` in ``cut`` -> unit numbers [units], the first to be removed
            in front. (Of any other group it does not matter which units go.)
        count_embeddings: whether embeddings and the output head are counted.
        quantity: what is counted; None: parameters.
    """

    def __init__(
        self,
        groups: Groups,
        cut: Sequence[Group],
        first_to_go: Mapping[str, np.ndarray],
        count_embeddings: bool = True,
        quantity: Quantity | None = None,
    ) -> None:
        self._numbers = {g.name: number for number, g in enumerate(cut)}
        self._units = [g.units for g in cut]
        self._turn: dict[int, list[int]] = {}  # layers group -> the turn at which each unit goes
        layer_of: dict[str, tuple[int, int]] = {}
        maps: dict[str, dict[int, dict[int, list[IndexMap]]]] = {}  # tensor -> dim -> group -> index maps
        counted = groups.parameters if count_embeddings else groups.parameters - groups.embeddings
        for number, group in enumerate(cut):
            if group.role == "layers":
                self._turn[number] = np.argsort(first_to_go[group.name]).tolist()
                layer_of.update({module: (number, unit) for unit, module in enumerate(group.modules)})
            for member in group.members:
                if member.parameter and member.tensor in counted:
                    by_dim = maps.setdefault(member.tensor, {})
                    by_dim.setdefault(member.dim, {}).setdefault(number, []).append(member.index)
        self._constant = 0
        self._tensors: list[_Tensor] = []
        self._touched: dict[int, list[_Tensor]] = {}
        for tensor in sorted(counted):
            weight = Fraction(1) if quantity is None else quantity.weights.get(tensor, Fraction(0))
            layer = _enclosing(tensor, layer_of)
            shape, dims = groups.shapes[tensor], maps.get(tensor, {})
            whole = prod(n for d, n in enumerate(shape) if d not in dims)
            self._add(
                _Tensor(whole, tuple(self._number(shape[d], dims[d]) for d in sorted(dims)), layer, weight),
                {number for by_group in dims.values() for number in by_group},
            )
        for term in () if quantity is None else quantity.terms:
            cutting = tuple(self._numbers[name] for name in term.groups if name in self._numbers)
            region = (term.amount, cutting, prod(self._units[i] for i in cutting))
            self._add(_Tensor(1, ((region,),), _enclosing(f"{term.module}.", layer_of)), set(cutting))

    def _add(self, entry: _Tensor, numbers: Set[int]) -> None:
        """An entry whose size these groups change."""
        if not numbers and entry.layer is None:
            self._constant += self._size(entry, self._units)
        elif entry.weight:
            self._tensors.append(entry)
            for number in numbers:
                self._touched.setdefault(number, []).append(entry)

    def _number(self, length: int, by_group: Mapping[int, list[IndexMap]]) -> tuple[Region, ...]:
        numbers = tuple(by_group)
        regions = _regions(length, tuple(tuple(v) for v in by_group.values()))
        out = []
        for size, touching in regions:
            cutting = tuple(numbers[i] for i in touching)
            out.append((size, cutting, prod(self._units[i] for i in cutting)))
        return tuple(out)

    def count(self, widths: Mapping[str, int]) -> int:
        """What is left when each named group keeps that many units per copy; groups not named stay whole."""
        kept = [widths.get(name, units) for name, units in zip(self._numbers, self._units, strict=True)]
        return self._constant + sum(self._size(t, kept) for t in self._tensors)

    def cost(self, group: Group) -> int:
        """What leaves with one unit of each copy when nothing else is cut.

        For role ``layers``: the mean over the layers, rounded up.
        """
        number = self._numbers[group.name]
        kept = list(self._units)
        if group.role == "layers":
            inside = [t for t in self._tensors if t.layer is not None and t.layer[0] == number]
            return -(-sum(self._size(t, kept) for t in inside) // group.units)
        touched = self._touched.get(number, [])
        whole = sum(self._size(t, kept) for t in touched)
        kept[number] -= 1
        return whole - sum(self._size(t, kept) for t in touched)

    def _size(self, tensor: _Tensor, kept: Sequence[int]) -> int:
        if tensor.layer is not None:
            number, unit = tensor.layer
            if self._turn[number][unit] < self._units[number] - kept[number]:
                return 0
        size = tensor.whole
        for regions in tensor.dims:
            length = 0
            for count, cutting, units in regions:
                for number in cutting:
                    count *= kept[number]
                length += count // units
            size *= length
        return size if tensor.weight == 1 else math.floor(size * tensor.weight)


def _enclosing(tensor: str, modules: Mapping[str, tuple[int, int]]) -> tuple[int, int] | None:
    """The entry of ``modules`` for the removable module that holds ``tensor``."""
    if not modules:
        return None
    parts = tensor.split(".")
    for end in range(1, len(parts)):
        found = modules.get(".".join(parts[:end]))
        if found is not None:
            return found
    return None


@lru_cache(maxsize=4096)
def _regions(length: int, maps: tuple[tuple[IndexMap, ...], ...]) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Split ``range(length)`` by which of ``maps`` touch each position: (positions, numbers of the touching maps)."""
    if len(maps) == 1 and len(maps[0]) == 1:  # most dimensions: no need to list the positions
        index = maps[0][0]
        touched = index.outer * index.units * index.width
        return ((touched, (0,)), (length - touched, ())) if touched < length else ((length, (0,)),)
    label = np.zeros(length, dtype=np.int64)
    sets: list[tuple[int, ...]] = [()]
    for number, indexes in enumerate(maps):
        touched_by = np.zeros(length, dtype=bool)
        for index in indexes:
            touched_by[index.positions().reshape(-1)] = True
        codes, label = np.unique(label * 2 + touched_by, return_inverse=True)
        sets = [sets[code // 2] + ((number,) if code % 2 else ()) for code in codes.tolist()]
    sizes = np.bincount(label, minlength=len(sets)).tolist()
    return tuple(zip(sizes, sets, strict=True))
