"""Every op of :mod:`pyprune.ops` in plain PyTorch: the definition that the compiled kernels are tested against.

These run on any device and dtype that PyTorch supports and are what :mod:`pyprune.ops` uses where no compiled library
is installed. They take arguments that the public functions have already checked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Formula(NamedTuple):
    """A per-element salience: its number in the compiled library, what it reads, and how it is computed."""

    code: int
    needs_grad: bool
    needs_curvature: bool
    element: Callable[[Tensor, Tensor, Tensor], Tensor]


# The signed form has no absolute value: the sum over a whole structure is taken first and its magnitude by the caller.
FORMULAS: dict[str, Formula] = {
    "abs": Formula(0, False, False, lambda w, g, h: w.abs()),
    "square": Formula(1, False, False, lambda w, g, h: w * w),
    "taylor_signed": Formula(2, True, False, lambda w, g, h: w * g),
    "taylor_abs": Formula(3, True, False, lambda w, g, h: (w * g).abs()),
    "fisher": Formula(4, False, True, lambda w, g, h: w * w * h),
    "mixed": Formula(5, True, True, lambda w, g, h: (w * g - 0.5 * (w * w * h)).abs()),
}


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are held in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def salience(
    formula: str,
    weights: Sequence[Tensor],
    grads: Sequence[Tensor] | None = None,
    curvatures: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Row and column sums of the per-element salience; see :func:`pyprune.ops.salience`."""
    spec = FORMULAS[formula]
    rows: list[Tensor] = []
    cols: list[Tensor] = []
    for i, weight in enumerate(weights):
        dtype = accumulation_dtype(weight.dtype)
        w = weight.detach().to(dtype)
        g = grads[i].detach().to(dtype) if spec.needs_grad and grads is not None else w
        h = curvatures[i].detach().to(dtype) if spec.needs_curvature and curvatures is not None else w
        element = spec.element(w, g, h)
        if element.dim() == 1:
            rows.append(element.clone() if element is w else element)
            cols.append(element.sum().reshape(1))
        else:
            rows.append(element.sum(-1))
            cols.append(element.sum(-2))
    return rows, cols


def activation_salience(
    x: Tensor,
    dy: Tensor,
    weight: Tensor,
    formula: str,
    transposed: bool = False,
    *,
    gradient_scale: float = 1.0,
    curvature_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Every sample's gradient at once, [samples, rows, columns]; see :func:`pyprune.ops.activation_salience`."""
    dtype = accumulation_dtype(weight.dtype)
    rows_input, cols_input = (x, dy) if transposed else (dy, x)
    each = rows_input.detach().to(dtype).transpose(1, 2) @ cols_input.detach().to(dtype)
    g, h = gradient_scale * each.sum(0), curvature_scale * each.square().sum(0)
    rows, cols = salience(formula, [weight], [g], [h])
    return rows[0], cols[0]


def accumulate_square_(curvatures: Sequence[Tensor], grads: Sequence[Tensor], scale: float = 1.0) -> None:
    """``h += scale * g * g`` in place; see :func:`pyprune.ops.accumulate_square_`."""
    for h, g in zip(curvatures, grads, strict=True):
        g = g.detach().to(h.dtype)
        h.detach().add_(g * g, alpha=scale)


def gather(
    tensors: Sequence[Tensor],
    indices: Sequence[Mapping[int, Tensor]],
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Kept positions of each tensor, contiguous; see :func:`pyprune.ops.gather`."""
    results: list[Tensor] = []
    for i, (tensor, kept) in enumerate(zip(tensors, indices, strict=True)):
        result = tensor.detach()
        for dim, index in kept.items():
            result = result.index_select(dim, index.to(result.device))
        if out is not None:
            out[i].detach().copy_(result)
            results.append(out[i])
        else:
            results.append(result.contiguous() if kept else result.clone(memory_format=torch.contiguous_format))
    return results


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of ``x`` and ``x^2`` over all dimensions but the last; see :func:`pyprune.ops.channel_moments`."""
    rows = x.detach().to(accumulation_dtype(x.dtype)).reshape(x.shape[:-1].numel(), x.shape[-1])
    return rows.sum(0), (rows * rows).sum(0)


def channel_dots(a: Tensor, b: Tensor) -> Tensor:
    """Sums of ``a * b`` over the middle dimension of [B, T, C]; see :func:`pyprune.ops.channel_dots`."""
    dtype = accumulation_dtype(a.dtype)
    return (a.detach().to(dtype) * b.detach().to(dtype)).sum(1)
