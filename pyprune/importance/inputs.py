"""What goes into linear layers: their inputs, handed over while a forward pass runs.

Layers are found by the functions that they call, as in :mod:`pyprune.importance.taps`, so that a linear layer, a
``Conv1D`` and one expert of stacked weights are all seen, whatever their modules are called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from pyprune.importance.taps import Key


@dataclass(frozen=True)
class Use:
    """One use of a matrix in a forward pass.

    Attributes:
        key: which matrix.
        x: its input, [rows, inputs].
        transposed: the matrix is stored [inputs, outputs], not [outputs, inputs].
        bias: what was added to the product, or None.
    """

    key: Key
    x: Tensor
    transposed: bool
    bias: Tensor | None

    def input_dim(self, ndim: int) -> int:
        """The dimension of the stored tensor (``ndim`` dimensions) along which the inputs lie."""
        return ndim - 2 if self.transposed else ndim - 1


class InputTaps(TorchFunctionMode):
    """Within it, as a context manager, every use of a watched matrix is added to ``uses``.

    Args:
        parameters: name -> parameter, the matrices [a, b], or stacked ones [experts, a, b].
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.uses: list[Use] = []
        self._names = {id(p): name for name, p in parameters.items()}
        self._stacked = {p.untyped_storage().data_ptr(): (n, p) for n, p in parameters.items() if p.dim() == 3}

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        read = _READ.get(func)
        if read is not None:
            found = read(*args, **kwargs)
            key = None if found is None else self._find(found[1])
            if key is not None and found is not None:
                x, _, bias, transposed = found
                self.uses.append(Use(key, x.detach().reshape(-1, x.shape[-1]), transposed, bias))
        return out

    def _find(self, weight: Any) -> Key | None:
        name = self._names.get(id(weight))
        if name is not None:
            return Key(name)
        if not self._stacked or not isinstance(weight, Tensor) or weight.dim() != 2:
            return None
        found = self._stacked.get(weight.untyped_storage().data_ptr())
        if found is None:
            return None
        name, p = found
        place, rest = divmod(int(weight.storage_offset() - p.storage_offset()), int(p.stride(0)))
        fits = weight.shape == p.shape[1:] and weight.stride() == p.stride()[1:] and rest == 0
        return Key(name, place) if fits else None


Found = tuple[Tensor, Any, "Tensor | None", bool] | None


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Found:
    return input, weight, bias, False


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Found:
    return (mat1, mat2, input, True) if beta == alpha == 1 and input.dim() == 1 else None


def _matmul(input: Any, other: Any) -> Found:
    return (input, other, None, True) if isinstance(input, Tensor) and input.dim() >= 2 else None


_READ: dict[Any, Callable[..., Found]] = {
    linear: _linear,
    torch.addmm: _addmm,
    torch.matmul: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.__matmul__: _matmul,
}
