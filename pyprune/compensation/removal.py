"""Optimal-brain-surgeon removal: which inputs of a matrix go when the others take over for them.

With H = A + lam * diag(A) (A the Gram matrix of the inputs), removing the inputs g and refitting the rest raises the
squared error by

    s_g = tr( W_g [ (H^-1)_gg ]^-1 W_g^T )                                     (Hassibi and Stork 1993, equation 5)

after which W <- W - W_g [(H^-1)_gg]^-1 (H^-1)_g: and H^-1 <- H^-1 - (H^-1)_:g [(H^-1)_gg]^-1 (H^-1)_g: speak of what is
left (SparseGPT and ZipLM, arXiv 2302.04089, section 3). Units are removed a few at a time; scores are exact between.

Where it is told what units are worth to the whole model, F_g (``token_fisher``: the expected loss without a refit), the
score is the geometric mean of s_g and of the part of F_g that a refit cannot make up for,

    sqrt( s_g * F_g s_g / S_g ) = s_g sqrt(F_g / S_g),      S_g = tr(W_g A_gg W_g^T)

S_g being the error of the layer's output without a refit.

``lam`` goes from the best refit on these very tokens (0) to no refit at all, where s_g is what Wanda compares: ridge in
proportion to the diagonal is what independent noise on every input does. On text of another kind than the calibration's
the middle does best: how the others make up for an input carries over only in part.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

PENALTY = 1.0  # lam for units of one input
PENALTY_HEADS = 0.01  # for units of many: which head goes is told best by how well the others make up for it
STEPS = 64  # single columns are removed in about so many rounds; units of several columns one by one


def removed_units(
    gram: Tensor, weight: Tensor, positions: np.ndarray, count: int, gone: np.ndarray, worth: Tensor | None = None
) -> np.ndarray:
    """Which units to remove from every copy.

    Args:
        gram: A, float64 [inputs, inputs].
        weight: W, float64 [outputs, inputs].
        positions: inputs that a unit holds, int64 [outer, units, k].
        count: units to remove from each of the ``outer`` copies.
        gone: inputs that other groups remove already, int64.
        worth: F_g, [outer, units], in any unit; None compares s_g alone.

    Returns:
        Bool [outer, units], ``count`` true in every row. Dead inputs go first.
    """
    outer, units, k = positions.shape
    taken = np.zeros((outer, units), dtype=bool)
    state = _State(gram, weight, PENALTY if k == 1 else PENALTY_HEADS)
    if len(gone):
        state.remove(torch.from_numpy(gone).to(gram.device))
    lost = np.isin(positions, gone).all(axis=2)
    at_once = 1 if k > 1 or outer > 1 else max(1, math.ceil(count / STEPS))
    where = torch.from_numpy(positions.copy()).to(gram.device)
    factors = None if worth is None else _factors(gram, weight, where, worth)
    while (left := count - int(taken[0].sum())) > 0:
        found = state.scores(where)
        scores = (found if factors is None else found * factors).cpu().numpy()
        scores[lost] = 0.0
        scores[taken] = np.inf
        chosen = np.argsort(scores, axis=1, kind="stable")[:, : min(at_once, left)]
        for o in range(outer):
            taken[o, chosen[o]] = True
        flat = np.concatenate([positions[o, chosen[o]].reshape(-1) for o in range(outer)])
        state.remove(torch.from_numpy(np.setdiff1d(flat, gone)).to(gram.device))
    return taken


def _factors(gram: Tensor, weight: Tensor, where: Tensor, worth: Tensor) -> Tensor:
    """sqrt(F_g / S_g), float64 [outer, units]; zero for what is dead."""
    if where.shape[2] == 1:
        alone = (weight.square().sum(0) * gram.diagonal())[where[:, :, 0]]
    else:
        columns = weight[:, where].permute(1, 2, 3, 0)  # [outer, units, k, outputs]
        inner = gram[where[..., :, None], where[..., None, :]]
        alone = (columns * (inner @ columns)).sum((2, 3))
    found = worth.to(alone).clamp_min(0) / alone
    return torch.where(alone > 0, found, torch.zeros_like(found)).sqrt()


def ridge(gram: Tensor, penalty: float) -> Tensor:
    """What is added to the diagonal, [inputs]: never zero, also where inputs are dead."""
    own, mean = gram.diagonal(), gram.diagonal().mean()
    return penalty * own + torch.where(mean > 0, 1e-4 * mean, torch.ones_like(mean))


class _State:
    """W and H^-1 of the inputs that are left. Removed inputs are zero in both, and one on the diagonal of H^-1."""

    def __init__(self, gram: Tensor, weight: Tensor, penalty: float) -> None:
        inner = gram.clone()
        inner.diagonal().add_(ridge(gram, penalty))
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(inner))
        self.weight = weight.clone()

    def scores(self, where: Tensor) -> Tensor:
        """s_g of every unit, float64 [outer, units]."""
        if where.shape[2] == 1:
            index = where[:, :, 0]
            return (self.weight.square().sum(0) / self.inverse.diagonal())[index]
        out = self.weight.new_empty(where.shape[:2])
        for o, row in enumerate(where):
            for u, index in enumerate(row):
                part = self.weight[:, index]
                out[o, u] = (part * torch.linalg.solve(self.inverse[index][:, index], part.t()).t()).sum()
        return out

    def remove(self, index: Tensor) -> None:
        """Remove inputs; the others take over."""
        if not len(index):
            return
        rows = self.inverse[index]
        share = torch.linalg.solve(rows[:, index], rows)
        self.weight.addmm_(self.weight[:, index], share, alpha=-1)
        self.inverse.addmm_(rows.t(), share, alpha=-1)
        self.weight[:, index] = 0
        self.inverse[index] = 0
        self.inverse[:, index] = 0
        self.inverse[index, index] = 1
