"""A dense model that computes what a cut one would: matrices are exchanged while it runs, and no weight is touched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from pyprune.importance.inputs import InputTaps, read_product
from pyprune.importance.taps import Key
from pyprune.ops.product import is_faster, product


@dataclass(frozen=True)
class Exchanged:
    """What a matrix is exchanged for.

    Attributes:
        weight: [outputs, inputs].
        bias: in place of the one that was added; None leaves it.
        zero: int64 positions of outputs that become zero, or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    zero: Tensor | None = None


Exchange = Callable[[Key, Tensor, "Tensor | None"], "Exchanged | None"]


class Masking(InputTaps):
    """Within it, as a context manager, watched matrices are exchanged, and linear layers take the faster product.

    Args:
        parameters: name -> parameter, the matrices that may be exchanged.

    Attributes:
        watched: the parameters.
        exchange: (which matrix, as [outputs, inputs], what is added to the product) -> what it is exchanged for, or
            None to leave it as it is.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(parameters)
        self.watched = dict(parameters)
        self.exchange: Exchange = lambda key, weight, bias: None

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = read_product(func, args, kwargs)
        if found is None:
            return func(*args, **kwargs)
        x, weight, bias, transposed = found
        key, _ = self._find(weight)
        if key is None:
            if func is linear and isinstance(weight, Tensor) and weight.dim() == 2 and is_faster(x):
                y = product(x, weight)
                return y if bias is None else y.add_(bias)
            return func(*args, **kwargs)
        matrix = weight.detach().t() if transposed else weight.detach()
        new = self.exchange(key, matrix, bias)
        if new is None:
            new = Exchanged(matrix)
        y = product(x, new.weight)
        added = bias if new.bias is None else new.bias
        if added is not None:
            y = y.add_(added)
        return y if new.zero is None else y.index_fill_(-1, new.zero, 0.0)


def zero_columns(weight: Tensor, gone: Tensor) -> Tensor:
    """A copy of ``weight`` [outputs, inputs] with zero columns."""
    return weight.index_fill(1, gone, torch.zeros((), dtype=weight.dtype, device=weight.device))
