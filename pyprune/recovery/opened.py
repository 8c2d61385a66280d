"""Narrow layers opened up for adapters: an adapter sits on the smaller matrix, inside of what picks and spreads."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pyprune.surgery.narrow import NarrowConv1D, NarrowLinear

MATRIX = ".matrix"  # what an opened layer's matrix is called below it


class _Opened(nn.Module):
    """A narrow layer with its matrix as a layer of its own, ``matrix``: an ordinary one, which peft knows."""

    def __init__(self, narrow: Any) -> None:
        super().__init__()
        self.__dict__["narrow"] = narrow  # not a child: its weight is the matrix's
        self.matrix = _matrix(narrow)

    def forward(self, input: Tensor) -> Tensor:
        narrow = self.__dict__["narrow"]
        return narrow._spread(self.matrix(narrow._picked(input)))


def _matrix(narrow: Any) -> nn.Module:
    """An ordinary layer that shares ``narrow``'s parameters."""
    from transformers.pytorch_utils import Conv1D

    matrix: Any
    if isinstance(narrow, NarrowLinear):
        matrix = nn.Linear(1, 1, bias=False, device="meta")
        matrix.out_features, matrix.in_features = narrow.weight.shape
    else:
        matrix = Conv1D(1, 1)
        matrix.nx, matrix.nf = narrow.weight.shape
    matrix.weight, matrix.bias = narrow.weight, narrow.bias
    return matrix


def open_narrow(model: nn.Module) -> dict[str, Any]:
    """Opens every narrow layer of ``model``; path -> the layer, for :func:`close_narrow`."""
    found = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, NarrowConv1D) or type(module) is NarrowLinear
    }
    for path, module in found.items():
        _set(model, path, _Opened(module))
    return found


def close_narrow(model: nn.Module, opened: dict[str, Any]) -> None:
    """Puts the narrow layers back, with the parameters that their matrices have now."""
    for path, module in opened.items():
        matrix: Any = model.get_submodule(path).matrix
        module.weight, module.bias = matrix.weight, matrix.bias
        _set(model, path, module)


def _set(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
