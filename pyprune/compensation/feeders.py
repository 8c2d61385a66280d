"""The matrices that feed a projection's inputs (an FFN's gate and up projections), and how its inputs follow them.

Which rows feed which input is what a group of FFN channels says. Slopes are found by running the block: what the
matrices give becomes the beginning of a graph that ends at the projection's inputs, and since an input depends on its
own channel alone, the gradient of their sum is the slope of each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

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
class Seen:
    """What one step showed.

    Attributes:
        inputs: of every matrix, [rows, inputs].
        slopes: derivative of the projection's inputs by what every matrix gave, [rows, outputs].
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    slopes: dict[str, Tensor] = field(default_factory=dict)


class SlopeTaps(InputTaps):
    """Within it, as a context manager, forward passes show how a projection's inputs follow the matrices that feed it.

    Args:
        reader: name of the projection.
        feeders: names of the matrices.
        parameters: all parameters by name.
    """

    def __init__(self, reader: str, feeders: Iterable[str], parameters: Mapping[str, nn.Parameter]) -> None:
        self._reader, self._feeders = reader, set(feeders)
        super().__init__({n: parameters[n] for n in (reader, *self._feeders)})
        self._given: dict[str, Tensor] = {}
        self._seen = Seen()

    def take(self) -> Seen | None:
        """What was seen since the last call; None where the projection does not read what these matrices give."""
        seen, self._seen, self._given = self._seen, Seen(), {}
        return seen if set(seen.slopes) == self._feeders else None

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        found = read_product(func, args, kwargs or {})
        key = None if found is None else self._find(found[1])[0]
        if found is None or key is None:
            return func(*args, **(kwargs or {}))
        if key.name == self._reader:
            self._end(found[0])
            return func(*args, **(kwargs or {}))
        with torch.no_grad():
            out = func(*args, **(kwargs or {})).detach().requires_grad_()
        self._given[key.name] = out
        self._seen.inputs[key.name] = found[0].detach().reshape(-1, found[0].shape[-1])
        torch.set_grad_enabled(True)
        return out.clone()  # what follows may change it in place

    def _end(self, x: Tensor) -> None:
        if x.requires_grad:
            given = list(self._given.values())
            slopes = torch.autograd.grad(x.float().sum(), given, allow_unused=True)
            for name, out, slope in zip(self._given, given, slopes, strict=True):
                if slope is not None:
                    self._seen.slopes[name] = slope.reshape(-1, out.shape[-1])
        torch.set_grad_enabled(False)
