"""Shapes of the compiled ops' results without their data, for ``torch.compile`` and ``opcheck``.

LibTorch's stable ABI has no meta implementations, so they are registered from Python when the library is loaded.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.register_fake("pyprune::salience")
def _salience(
    weights: list[Tensor], grads: list[Tensor], curvatures: list[Tensor], formula: int
) -> tuple[Tensor, Tensor]:
    """Flat sums: rows [sum of B * R], columns [sum of B * C]; a vector is one column."""
    rows = sum(w.numel() if w.dim() == 1 else w.shape[:-1].numel() for w in weights)
    cols = sum(1 if w.dim() == 1 else w.shape[:-2].numel() * w.shape[-1] for w in weights)
    dtype = torch.float64 if weights[0].dtype == torch.float64 else torch.float32
    return weights[0].new_empty(rows, dtype=dtype), weights[0].new_empty(cols, dtype=dtype)


@torch.library.register_fake("pyprune::salience_again_")
def _salience_again(row_sums: Tensor, col_sums: Tensor, host: Tensor, workspace: Tensor) -> None:
    """In place: nothing is returned."""


@torch.library.register_fake("pyprune::activation_salience")
def _activation_salience(
    x: Tensor, dy: Tensor, weight: Tensor, formula: int, transposed: bool, gradient_scale: float, curvature_scale: float
) -> tuple[Tensor, Tensor]:
    """Row sums [weight.shape[0]] and column sums [weight.shape[1]]."""
    return tuple(weight.new_empty(size, dtype=torch.float32) for size in weight.shape)  # type: ignore[return-value]


@torch.library.register_fake("pyprune::accumulate_square_")
def _accumulate_square(curvatures: list[Tensor], grads: list[Tensor], scale: float) -> None:
    """In place: nothing is returned."""


@torch.library.register_fake("pyprune::gather")
def _gather(tensors: list[Tensor], runs: Tensor, run_counts: list[int], out: list[Tensor]) -> None:
    """Into ``out``: nothing is returned."""


@torch.library.register_fake("pyprune::channel_moments")
def _channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sums and sums of squares, both [C]."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape[-1], dtype=dtype), x.new_empty(x.shape[-1], dtype=dtype)


@torch.library.register_fake("pyprune::channel_dots")
def _channel_dots(a: Tensor, b: Tensor) -> Tensor:
    """Sums [B, C]; a tensor [T, C] is one batch."""
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    return a.new_empty(a.shape[0] if a.dim() == 3 else 1, a.shape[-1], dtype=dtype)
