"""The matrices that feed a projection's inputs (an FFN's gate and up projections), and how its inputs follow them.

Which rows feed which input is what a group of FFN channels says. What the block does between the matrices and the
projection is written down while it runs, and can be done again for other tokens and fewer channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from pyprune.importance.inputs import InputTaps, read_product
from pyprune.selection.plan import Cut

ROLE = "ffn"


@dataclass(frozen=True)
class Rows:
    """Rows of one matrix, in the order of the inputs that they feed. A matrix that holds gate and up projections in
    one is two of these.

    Attributes:
        tensor: the parameter's name.
        dim: the dimension along which its rows lie: 0, or 1 where it is stored [inputs, outputs].
        positions: int64 [channels].
    """

    tensor: str
    dim: int
    positions: np.ndarray


def rows_of(cut: Cut, reader: str, dim: int, parameters: Mapping[str, nn.Parameter]) -> tuple[np.ndarray, list[Rows]]:
    """What stays of an FFN: (int64 [channels], inputs of ``reader``; the rows that feed them, none for other groups).

    Args:
        cut: of the group.
        reader: name of the projection, whose inputs lie along ``dim``.
    """
    mine = [m for m in cut.group.members if (m.tensor, m.dim) == (reader, dim)]
    if cut.group.role != ROLE or cut.group.outer != 1 or len(mine) != 1:
        return np.empty(0, dtype=np.int64), []
    kept = list(cut.kept[0])
    inputs = mine[0].index.positions()[0, kept]  # [units, inputs of each]
    found = []
    for m in cut.group.members:
        p = parameters.get(m.tensor)
        if p is None or p.dim() != 2 or m.tensor == reader:
            continue
        rows = m.index.positions()[0, kept]
        if rows.shape[1] % inputs.shape[1]:
            return np.empty(0, dtype=np.int64), []
        parts = np.split(rows, rows.shape[1] // inputs.shape[1], axis=1)
        found += [Rows(m.tensor, m.dim, part.reshape(-1)) for part in parts]
    return inputs.reshape(-1), found


@dataclass
class Given:
    """What one matrix was given in a forward pass.

    Attributes:
        x: [rows, inputs].
        bias: what is added to its product, or None.
    """

    x: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class _Slot:
    """A place of a program where a tensor stands that depends on what the matrices give."""

    number: int


class Program:
    """What a block does between some matrices and the projection that reads what they give: the calls, written down as
    they were made, which can be made again for any tokens and any channels.

    Calls that only move tokens between leading dimensions are left out: tokens lie along one dimension here.
    """

    def __init__(self) -> None:
        self._slots: dict[int, int] = {}  # id of a tensor -> its slot
        self._alive: list[Tensor] = []  # so that ids stay theirs while the program is written
        self._starts: dict[str, int] = {}
        self._calls: list[tuple[Any, Any, Any, list[int]]] = []
        self._end: int | None = None

    def begin(self, name: str, z: Tensor) -> None:
        """The matrix ``name`` gave ``z``."""
        self._starts[name] = self._slot(z)

    def write(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """A call was made."""
        inputs = [self._slots.get(id(t)) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        known = [i for i in inputs if i is not None]
        outputs = [out] if isinstance(out, Tensor) else list(out) if isinstance(out, (tuple, list)) else []
        if not known or not outputs or not all(isinstance(t, Tensor) for t in outputs):
            return
        if func in _MOVES and out.shape[-1:] == args[0].shape[-1:]:
            self._alive.append(out)
            self._slots[id(out)] = known[0]
            return
        filled = tree_map_only(Tensor, self._named, (args, kwargs))
        self._calls.append((func, *filled, [self._slot(t) for t in outputs]))

    def end(self, x: Tensor) -> None:
        """The projection read ``x``."""
        self._end = self._slots.get(id(x))
        self._slots, self._alive = {}, []

    def complete(self, names: Iterable[str]) -> bool:
        """Whether it leads from all of these matrices to the projection."""
        return self._end is not None and set(self._starts) == set(names)

    def __call__(self, given: Mapping[str, Tensor]) -> Tensor:
        """What the projection would read, [tokens, channels].

        Args:
            given: what every matrix gives, [tokens, its channels]; not changed.
        """
        values = {self._starts[name]: z.clone() for name, z in given.items()}  # a call may change it in place

        def filled(slot: _Slot) -> Tensor:
            return values[slot.number]

        for func, args, kwargs, outputs in self._calls:
            args, kwargs = tree_map_only(_Slot, filled, (args, kwargs))
            out = func(*args, **kwargs)
            values.update(zip(outputs, [out] if isinstance(out, Tensor) else out, strict=True))
        assert self._end is not None
        return values[self._end]

    def _slot(self, tensor: Tensor) -> int:
        """A new slot for a tensor; one that was changed in place is another from here on."""
        number = len(self._alive)
        self._alive.append(tensor)
        self._slots[id(tensor)] = number
        return number

    def _named(self, tensor: Tensor) -> Any:
        number = self._slots.get(id(tensor))
        return tensor if number is None else _Slot(number)


_MOVES = {Tensor.view, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten, Tensor.contiguous}


class FeederTaps(InputTaps):
    """Within it, as a context manager, forward passes show what enters the matrices that feed a projection and, once,
    what is done to what they give before the projection reads it.

    Args:
        reader: name of the projection.
        feeders: names of the matrices.
        parameters: all parameters by name.

    Attributes:
        program: of the first pass.
    """

    def __init__(self, reader: str, feeders: Iterable[str], parameters: Mapping[str, nn.Parameter]) -> None:
        self._reader, self._feeders = reader, set(feeders)
        super().__init__({n: parameters[n] for n in (reader, *self._feeders)})
        self._given: dict[str, Given] = {}
        self._writing = True
        self.program = Program()

    def take(self) -> dict[str, Given] | None:
        """What entered each matrix since the last call; None where the projection does not read what they give."""
        given, self._given = self._given, {}
        return given if set(given) == self._feeders and self.program.complete(self._feeders) else None

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = read_product(func, args, kwargs)
        key = None if found is None else self._find(found[1])[0]
        if found is not None and key is not None and key.name == self._reader and self._writing and self._given:
            self.program.end(found[0])
            self._writing = False
        out = func(*args, **kwargs)
        if found is not None and key is not None and key.name in self._feeders:
            self._given[key.name] = Given(found[0].detach().reshape(-1, found[0].shape[-1]), found[2])
            if self._writing:
                self.program.begin(key.name, out)
        elif self._writing and self._given:
            self.program.write(func, args, kwargs, out)
        return out
