"""Optimal Brain Surgeon for structures: the least squared error of a layer's output after a unit's input columns go.

    s_g = tr( W_g [ (H^-1)_gg ]^-1 W_g^T ),   H = E[x x^T] + 0.01 * mean(diag) * 1,   W_g the unit's columns of W,

which for one column j is sum over rows of w_j^2 / [H^-1]_jj: what stays of the error when the other columns are
refitted in the best way (``compensation="least-squares"``). Hassibi and Stork 1993, "Second order derivatives for
network pruning", equation 5; for blocks Kurtic et al. 2023, "ZipLM" (arXiv 2302.04089), equation 3.
"""

import torch
from torch import Tensor

from pyprune.importance.input_scores import InputStatistics
from pyprune.importance.registry import Criterion

DAMPING = 0.01  # share of the mean diagonal, as in SparseGPT (arXiv 2301.00774)


def units(weight: Tensor, inputs: InputStatistics, positions: Tensor) -> Tensor:
    """Float64 [outer, units]; zeros where nothing ever entered the layer."""
    assert inputs.gram is not None
    places = positions.to(weight.device)
    h = inputs.gram.to(torch.float64) / max(inputs.rows, 1)
    mean = h.diagonal().mean()
    if not mean > 0:
        return weight.new_zeros(places.shape[:2])
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h + DAMPING * mean * torch.eye(len(h)).to(h)))
    if places.shape[-1] == 1:
        return (weight.square().sum(0) / inverse.diagonal())[places[..., 0]]
    flat = places.reshape(-1, places.shape[-1])
    blocks = inverse[flat[:, :, None], flat[:, None, :]]
    columns = weight[:, flat].permute(1, 2, 0)  # [units, k, outputs]
    solved = torch.cholesky_solve(columns, torch.linalg.cholesky(blocks))
    return (columns * solved).sum((1, 2)).reshape(places.shape[:2])


CRITERION = Criterion("obs", "tr(W_g [(H^-1)_gg]^-1 W_g^T) (Hassibi and Stork 1993)", inputs="gram", units=units)
