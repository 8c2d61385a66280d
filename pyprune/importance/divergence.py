"""The Kullback-Leibler divergence of next-token distributions from the dense model's, of which little is kept.

    KL(p || q) = sum_i p_i log(p_i / q_i),   p: dense, q: another model

over the dense model's most likely tokens and one class for all others together, which is a lower bound of the
divergence over the whole vocabulary (data-processing inequality). Of the dense model only these numbers are kept for
each token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyprune.importance.steps import Step

TOP = 256
PIECE_BYTES = 32 << 20  # of wide logits at a time
LEAST = -30.0  # log-probability of all others together, at least: what rounding hides


def real_tokens(step: Step) -> Tensor:
    """Which positions are text and not padding, bool [batch, length]."""
    mask = step.inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == step.targets.shape:
        return mask != 0
    return torch.ones_like(step.targets, dtype=torch.bool)


def scored(logits: Tensor, real: Tensor) -> Tensor:
    """Of logits [batch, length, vocabulary] those of the tokens in ``real`` (bool [batch, length]): [tokens,
    vocabulary], no copy where all of them count."""
    return logits.flatten(0, -2) if bool(real.all()) else logits[real]


def pieces(logits: Tensor) -> Sequence[Tensor]:
    return logits.split(max(1, PIECE_BYTES // (4 * logits.shape[-1])))


def summary(logits: Tensor, top: int = TOP) -> tuple[Tensor, Tensor]:
    """Of logits [tokens, vocabulary]: the most likely tokens, int32 [tokens, top]; their log-probabilities and that of
    all others together, float32 [tokens, top + 1]."""
    top = min(top, logits.shape[-1] - 1)
    places, values = [], []
    for piece in pieces(logits):
        wide = piece.float()
        best = wide.topk(top, dim=-1)
        places.append(best.indices.to(torch.int32))
        values.append(_with_rest(best.values.double() - wide.logsumexp(-1, keepdim=True).double()).float())
    return torch.cat(places), torch.cat(values)


def _with_rest(logs: Tensor) -> Tensor:
    """Log-probabilities [tokens, top], float64, and that of what is left; at least e^LEAST."""
    rest = (1 - logs.exp().sum(-1, keepdim=True)).clamp_min(math.exp(LEAST)).log()
    return torch.cat([logs, rest], dim=-1)


def divergence(logits: Tensor, places: Tensor, values: Tensor) -> float:
    """Sum over the tokens of KL(dense || logits), nats."""
    total, row = 0.0, 0
    for piece in pieces(logits):
        rows = slice(row, row + len(piece))
        row += len(piece)
        wide = piece.float()
        chosen = wide.gather(1, places[rows].long()).double()
        q = _with_rest(chosen - wide.logsumexp(-1, keepdim=True).double())
        p = values[rows].double()
        total += float((p.exp() * (p - q)).sum())
    return total


@torch.no_grad()
def divergence_and_seed(logits: Tensor, places: Tensor, values: Tensor, factor: float) -> tuple[float, Tensor]:
    """Sum over the tokens of KL(dense || logits), nats, and the gradient of ``factor`` times it.

    With z the logits and q = softmax(z), dKL/dz_i = q_i - p_i for the tokens of ``places``; for others it is
    q_j (1 - p_r / q_r), p_r and q_r the probabilities of all others together.

    Args:
        logits: [tokens, vocabulary].
        places, values: of :func:`summary`.
        factor: applied before rounding to the logits' type.

    Returns:
        (divergence, [tokens, vocabulary] in the logits' type).
    """
    seed = torch.empty_like(logits)
    total, row = 0.0, 0
    for piece in pieces(logits):
        rows = slice(row, row + len(piece))
        row += len(piece)
        at, p = places[rows].long(), values[rows]
        q = torch.log_softmax(piece, dim=-1, dtype=torch.promote_types(piece.dtype, torch.float32))
        best = q.gather(1, at)
        q.exp_().scatter_(1, at, 0.0)
        others = q.sum(-1, keepdim=True).clamp_min(math.exp(LEAST))
        total += float((p.exp() * (p - torch.cat([best, others.log()], dim=1))).sum(dtype=torch.float64))
        q.mul_(1 - p[:, -1:].exp() / others).scatter_(1, at, (best.exp() - p[:, :-1].exp()).to(q.dtype))
        seed[rows] = q.mul_(factor)
    return total, seed
