"""A Gauss-Newton step for matrices behind an activation: what is left of an FFN comes nearer to what all of it gave.

An FFN computes y = D a(z_1, z_2, ...) with z_i = W_i x, and channel j of ``a`` depends on row j of every W_i alone.
Once channels are gone and D is refitted, a residual r_t = y_t - D a_t is left on every token t. To first order, changes
P_i of what is left of the W_i change the output by D sum_i s_i * (P_i x), with slopes s_i = da / dz_i. Wanted are

    min over P_i   sum_t w_t |r_t - D sum_i s_it * (P_i x_it)|^2  +  lam sum_i sum_j m_i c_ij |P_i[j]|^2

    c_ij = |D_:j|^2 sum_t w_t s_itj^2 / sum_t w_t,       m_i = mean diagonal of  A_i = sum_t w_t x_it x_it^T

a linear least-squares problem (Gauss-Newton: Nocedal and Wright, Numerical Optimization, section 10.3) with a ridge
that weighs every row by what it moves. It is solved by a few iterations of conjugate gradients, preconditioned by the
Kronecker product of diag(c_i) and A_i + lam m_i 1, which would be the whole problem if slopes were independent of
inputs and of each other. Stopping early regularises too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyprune import ops

CHUNK = 1024  # tokens in one product: what lies between products stays in the caches


@dataclass
class Feeder:
    """What one matrix that feeds an activation does on some tokens.

    Attributes:
        x: its inputs, [tokens, inputs].
        slope: derivative of the activation's channels by what the matrix gives for them, [tokens, channels].
    """

    x: Tensor
    slope: Tensor


def step(
    feeders: Sequence[Feeder], residual: Tensor, weights: Tensor, reader: Tensor, penalty: float, iterations: int
) -> list[Tensor]:
    """P_i of the formula above, float32 [channels, inputs], one for each feeder.

    Args:
        feeders: of one dtype; products are made in it.
        residual: r, [tokens, outputs], of that dtype.
        weights: w, float32 [tokens].
        reader: D, [outputs, channels].
        penalty: lam, above 0.
        iterations: of conjugate gradients, each of which goes over all tokens once.
    """
    problem = _Problem(feeders, residual, weights, reader, penalty)
    return _conjugate_gradients(problem, iterations)


class _Problem:
    def __init__(
        self, feeders: Sequence[Feeder], residual: Tensor, weights: Tensor, reader: Tensor, penalty: float
    ) -> None:
        self.feeders, self.weights, self.penalty = feeders, weights, penalty
        dtype = feeders[0].x.dtype
        self.reader, self.turned = reader.to(dtype), reader.t().to(dtype).contiguous()
        power = reader.float().square().sum(0)
        shapes = [(f.slope.shape[1], f.x.shape[1]) for f in feeders]
        self.gradient = [weights.new_zeros(s) for s in shapes]
        grams = {id(f.x): weights.new_zeros(s[1], s[1]) for f, s in zip(feeders, shapes, strict=True)}
        self.curvature = [weights.new_zeros(s[0]) for s in shapes]
        for part in self._chunks():
            root = weights[part, None].sqrt()
            pulled = self._pulled(residual[part].float(), part)
            for x in {id(f.x): f.x for f in feeders}.values():
                ops.gram(x[part].float() * root, grams[id(x)])
            for i, f in enumerate(feeders):
                self.curvature[i] += (f.slope[part].float() * root).square().sum(0)
                self.gradient[i] += _product((pulled * f.slope[part]).t(), f.x[part].t())
        for c in self.curvature:
            c *= power / weights.sum()
            c += 1e-3 * c.mean() + torch.finfo(c.dtype).tiny
        inverses = {key: _inverse(gram, penalty) for key, gram in grams.items()}
        self.inverses = [inverses[id(f.x)] for f in feeders]
        self.means = [grams[id(f.x)].diagonal().mean() for f in feeders]

    def _chunks(self) -> list[slice]:
        return [slice(k, k + CHUNK) for k in range(0, len(self.weights), CHUNK)]

    def _pulled(self, outputs: Tensor, part: slice) -> Tensor:
        """D^T w r, [tokens, channels]."""
        return _product(outputs * self.weights[part, None], self.turned)

    def times(self, change: Sequence[Tensor]) -> list[Tensor]:
        """The problem's matrix, times a change of all feeders."""
        out = [self.penalty * m * c[:, None] * p for m, c, p in zip(self.means, self.curvature, change, strict=True)]
        for part in self._chunks():
            moved = torch.zeros_like(self.feeders[0].slope[part], dtype=torch.float32)
            for f, p in zip(self.feeders, change, strict=True):
                moved += f.slope[part] * _product(f.x[part], p)
            pulled = self._pulled(_product(moved, self.reader), part)
            for i, f in enumerate(self.feeders):
                out[i] += _product((pulled * f.slope[part]).t(), f.x[part].t())
        return out

    def preconditioned(self, change: Sequence[Tensor]) -> list[Tensor]:
        return [(p @ inverse) / c[:, None] for p, inverse, c in zip(change, self.inverses, self.curvature, strict=True)]


def _inverse(gram: Tensor, penalty: float) -> Tensor:
    """(A + lam m 1)^-1, float32."""
    wide = gram.double()
    wide.diagonal().add_(penalty * wide.diagonal().mean() + torch.finfo(gram.dtype).tiny)
    return torch.linalg.inv(wide).to(gram.dtype)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b^T`` in the dtype of that operand which is not float32, as float32."""
    dtype = b.dtype if a.dtype == torch.float32 else a.dtype
    return ops.product(a.to(dtype), b.to(dtype)).float()


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return torch.stack([(x.double() * y.double()).sum() for x, y in zip(a, b, strict=True)]).sum()


def _conjugate_gradients(problem: _Problem, iterations: int) -> list[Tensor]:
    left = problem.gradient
    found = [torch.zeros_like(g) for g in left]
    ahead = problem.preconditioned(left)
    towards = [z.clone() for z in ahead]
    size = _dot(left, ahead)
    for _ in range(iterations):
        if not size > 0:
            break
        image = problem.times(towards)
        steepness = _dot(towards, image)
        if not steepness > 0:
            break
        length = float(size / steepness)
        for f, r, t, m in zip(found, left, towards, image, strict=True):
            f.add_(t, alpha=length)
            r.sub_(m, alpha=length)
        ahead = problem.preconditioned(left)
        before, size = size, _dot(left, ahead)
        towards = [z.add(t, alpha=float(size / before)) for z, t in zip(ahead, towards, strict=True)]
    return found
