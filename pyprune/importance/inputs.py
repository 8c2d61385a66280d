"""What goes into linear layers: their inputs, handed over while a forward pass runs.

Layers are found by the functions that they call, as in :mod:`pyprune.importance.taps`, so that a linear layer, a
``Conv1D`` and one expert of stacked weights are all seen, whatever their modules are called.
"""

from __future__ import annotations

from collections import Counter
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
        tokens: int64 [rows], which of the step's tokens the rows are, where they were picked out (an expert's); None
            where the rows are all of them, or where that cannot be seen.
    """

    key: Key
    x: Tensor
    transposed: bool
    bias: Tensor | None
    tokens: Tensor | None = None

    def input_dim(self, ndim: int) -> int:
        """The dimension of the stored tensor (``ndim`` dimensions) along which the inputs lie."""
        return ndim - 2 if self.transposed else ndim - 1


class InputTaps(TorchFunctionMode):
    """Within it, as a context manager, every use of a watched matrix is added to ``uses``.

    Args:
        parameters: name -> parameter, the matrices [a, b], or stacked ones [experts, a, b].
        tokens: tokens of the step, so that rows which are picked out of them are told.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], tokens: int | None = None) -> None:
        super().__init__()
        self._tokens = tokens
        self._picked: Tensor | None = None
        self.uses: list[Use] = []
        self._names = {id(p): name for name, p in parameters.items()}
        # Views of a parameter are told by their storage, where that holds no other watched one.
        owners = Counter(p.untyped_storage().data_ptr() for p in parameters.values())
        self._storages = {
            place: (n, p)
            for n, p in parameters.items()
            for place in (p.untyped_storage().data_ptr(),)
            if owners[place] == 1
        }

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        found = read_product(func, args, kwargs)
        if func is Tensor.__getitem__ and self._tokens is not None:
            picked = picked_rows(args[0], args[1], self._tokens)
            self._picked = self._picked if picked is None else picked
        if found is not None:
            x, weight, bias, transposed = found
            key, turned = self._find(weight)
            if key is not None:
                rows = x.detach().reshape(-1, x.shape[-1])
                chosen = self._picked if self._picked is not None and len(self._picked) == len(rows) else None
                chosen = None if len(rows) == self._tokens and key.expert is None else chosen
                self.uses.append(Use(key, rows, transposed != turned, bias, chosen))
        return out

    def _find(self, weight: Any) -> tuple[Key | None, bool]:
        """Which matrix it is, if it is watched, and whether it is given as its transpose."""
        name = self._names.get(id(weight))
        if name is not None:
            return Key(name), False
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            return None, False
        name, p = self._storages.get(weight.untyped_storage().data_ptr(), (None, weight))
        if name is None:
            return None, False
        place, rest = (
            (0, 0) if p.dim() == 2 else divmod(int(weight.storage_offset() - p.storage_offset()), int(p.stride(0)))
        )
        for view, turned in ((weight, False), (weight.t(), True)):
            if view.shape == p.shape[-2:] and view.stride() == p.stride()[-2:] and rest == 0:
                return Key(name, None if p.dim() == 2 else int(place)), turned
        return None, False


def picked_rows(source: Any, index: Any, tokens: int) -> Tensor | None:
    """The numbers of the tokens that an indexing picks out of all of them, or None where it is another one."""
    index = index[0] if isinstance(index, tuple) and index else index
    if not isinstance(source, Tensor) or source.dim() != 2 or source.shape[0] != tokens:
        return None
    return index if isinstance(index, Tensor) and index.dim() == 1 and index.dtype == torch.int64 else None


Found = tuple[Tensor, Any, "Tensor | None", bool] | None


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Found:
    return input, weight, bias, False


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Found:
    return (mat1, mat2, input, True) if beta == alpha == 1 and input.dim() == 1 else None


def _matmul(input: Any, other: Any) -> Found:
    return (input, other, None, True) if isinstance(input, Tensor) and input.dim() >= 2 else None


def read_product(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Found:
    """(input, weight, bias, whether the weight is stored [inputs, outputs]) of a call that multiplies, else None."""
    read = _READ.get(func)
    return None if read is None else read(*args, **kwargs)


def with_input(
    args: Sequence[Any], kwargs: Mapping[str, Any], x: Tensor, other: Tensor
) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of such a call with ``other`` in place of its input ``x``."""
    return [other if a is x else a for a in args], {k: other if a is x else a for k, a in kwargs.items()}


_READ: dict[Any, Callable[..., Found]] = {
    linear: _linear,
    torch.addmm: _addmm,
    torch.matmul: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.__matmul__: _matmul,
}
