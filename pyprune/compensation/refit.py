"""The least-squares refit of one matrix, from Gram matrices alone, in float64.

A layer computes y = W x, and only the inputs ``k`` stay. Wanted is the W' [outputs, |k|] that comes nearest to targets
t on the calibration tokens without leaving the original columns for nothing:

    min over W'   sum_t w_t |t - W' x_k|^2 + lam * m * |W' - W_k|^2,     m = mean of the diagonal of A_kk
    W' = (C_k + lam * m * W_k) (A_kk + lam * m * 1)^-1,                  A = sum w_t x x^T,  C_k = sum w_t t x_k^T

With the layer's own output as target, C = W A, so A is all that is needed (the refit of SparseGPT, arXiv 2301.00774,
equation 2, and OSSCAR, arXiv 2403.12983, with a ridge towards the original weights). Few tokens fit any target, so
``lam`` is chosen by the error on tokens that the fit has not seen, and no refit is always among the choices. Once it is
chosen, those tokens join the fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyprune import ops

PENALTIES = (0.003, 0.03, 0.1, 0.3, 1.0, 3.0)
BLENDS = (0.0, 0.5, 1.0)


@dataclass
class Sums:
    """What the tokens of one part of the calibration come to for one matrix.

    Attributes:
        gram: sum of w x x^T, [inputs, inputs].
        cross: sum of w x t^T, [inputs, outputs], for targets that are not the layer's own output; else None.
        power: sum of w |t|^2 of those targets.
        rows: inputs that were added.
    """

    gram: Tensor
    cross: Tensor | None = None
    power: float = 0.0
    rows: int = 0

    def add(self, x: Tensor, weights: Tensor, target: Tensor | None = None) -> None:
        """Add inputs [rows, inputs] with weights [rows] and, where the targets are apart, targets [rows, outputs]."""
        root = weights.to(self.gram.dtype).sqrt()[:, None]
        scaled = x.to(self.gram.dtype) * root
        ops.gram(scaled, self.gram)
        if target is not None:
            goal = target.to(self.gram.dtype) * root
            part = scaled.t() @ goal
            self.cross = part if self.cross is None else self.cross.add_(part)
            self.power += float(goal.double().square().sum())
        self.rows += int((weights > 0).sum())


@dataclass(frozen=True)
class Refit:
    """A matrix after its inputs were cut.

    Attributes:
        weight: float64 [outputs, inputs], zero in the columns that go.
        fitted: float64 [outputs, kept], what the held-out tokens have no part in.
        penalty: the lam that was chosen; None where the original columns were better or nothing could be fitted.
        blend: share of the separate targets in what was fitted (0: the layer's own output).
        before: squared error of the cut without a refit on the held-out tokens, as a fraction of the targets' power.
        after: the same with the refit on the other tokens; never above ``before``.
    """

    weight: Tensor
    fitted: Tensor
    penalty: float | None
    blend: float
    before: float
    after: float


def solve(gram: Tensor, cross: Tensor, weight: Tensor, kept: Tensor, penalty: float) -> Tensor | None:
    """The formula above: float64 [outputs, kept], or None where the matrix is not positive definite.

    Args:
        gram: A, float64 [inputs, inputs].
        cross: C transposed, float64 [inputs, outputs].
        weight: W, float64 [outputs, inputs].
        kept: int64 positions of the inputs that stay.
        penalty: lam.
    """
    inner = gram[kept][:, kept]
    ridge = penalty * inner.diagonal().mean()
    inner.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(inner)
    if failed:
        return None
    return torch.cholesky_solve(cross[kept] + ridge * weight[:, kept].t(), factor).t()


def squared_error(gram: Tensor, cross: Tensor, power: float, weight: Tensor, kept: Tensor) -> float:
    """sum of w |t - weight x_k|^2, with ``weight`` float64 [outputs, kept]."""
    inner = gram[kept][:, kept]
    found = power - 2 * float((weight.t() * cross[kept]).sum()) + float(((weight @ inner) * weight).sum())
    return max(found, 0.0)


def fits(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether all of ``values`` are finite, and stay so in ``dtype``."""
    return bool(values.to(dtype).isfinite().all())


def refit(
    weight: Tensor, kept: Tensor, train: Sums, held: Sums, penalties: Sequence[float] = PENALTIES,
    blends: Sequence[float] = BLENDS, dtype: torch.dtype = torch.float64,
) -> Refit:  # fmt: skip
    """Fit on ``train``, choose on ``held``, and with what was chosen fit on both.

    Weights that ``dtype`` has no room for are not chosen.

    Args:
        weight: float64 [outputs, inputs].
        kept: int64 positions of the inputs that stay.
        blends: shares of the separate targets that are tried, where there are such targets.
        dtype: that the matrix is kept in.
    """
    gram, gram_held = train.gram.double(), held.gram.double()
    own, own_held = gram @ weight.t(), gram_held @ weight.t()
    goal_held = own_held if held.cross is None else held.cross.double()
    power = float((weight.t() * own_held).sum()) if held.cross is None else held.power
    best = weight[:, kept]
    least = first = squared_error(gram_held, goal_held, power, best, kept)
    penalty, blend = None, 0.0
    fittable = held.rows > 0 and train.rows > 0 and bool(gram[kept, kept].mean() > 0)
    for lam in penalties if fittable else ():
        goals = [own] if train.cross is None else [own, train.cross.double()]
        found = [solve(gram, goal, weight, kept, lam) for goal in goals]
        for share in (0.0,) if train.cross is None else blends:
            ends = [f for f in (found[0], found[-1]) if f is not None]
            trial = torch.lerp(ends[0], ends[1], share) if len(ends) == 2 else None
            if trial is None or not fits(trial, dtype):
                continue
            error = squared_error(gram_held, goal_held, power, trial, kept)
            if error < least:
                best, least, penalty, blend = trial, error, lam, share
    fitted = best
    if penalty is not None:
        goals = [own + own_held]
        if train.cross is not None and held.cross is not None:
            goals.append(train.cross.double() + held.cross.double())
        both = [solve(gram + gram_held, goal, weight, kept, penalty) for goal in goals]
        ends = [f for f in both if f is not None]
        last = torch.lerp(ends[0], ends[-1], blend) if len(ends) == len(goals) else None
        if last is not None and fits(last, dtype):
            best = last
    out = torch.zeros_like(weight)
    out[:, kept] = best
    scale = power if power > 0 else 1.0
    return Refit(out, fitted, penalty, blend, first / scale, least / scale)
