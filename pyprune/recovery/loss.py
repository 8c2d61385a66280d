"""The loss: cross-entropy on the text, and the divergence from the teacher's most likely tokens.

Logits are wide: a few copies of them in float32 would be most of the memory of a step. So they are gone through a few
positions at a time, and the gradient of each is put in its place at once, in the type that the logits have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pyprune.recovery.packing import IGNORED

PIECE_BYTES = 32 << 20  # of float32 logits at a time


@dataclass(frozen=True)
class Answers:
    """What the teacher says at each learned position of a batch, in the order of :func:`learned_positions`.

    Attributes:
        tokens: int64 [positions, k], the k most likely tokens.
        log_probs: [positions, k], their log-probabilities at the temperature, over the whole vocabulary.
    """

    tokens: Tensor
    log_probs: Tensor


def learned_positions(labels: Tensor) -> Tensor:
    """Bool [batch, length - 1]: positions t whose next token is learned."""
    return labels[:, 1:] != IGNORED


def teacher_answers(logits: Tensor, labels: Tensor, k: int, temperature: float) -> Answers:
    """The teacher's k most likely tokens and log softmax(z / T) there."""
    scaled = logits[:, :-1][learned_positions(labels)].float() / temperature
    top = scaled.topk(min(k, scaled.shape[-1]), dim=-1)
    return Answers(top.indices, top.values - torch.logsumexp(scaled, dim=-1, keepdim=True))


def training_loss(
    logits: Tensor, labels: Tensor, answers: Answers | None = None, weight: float = 0.0, temperature: float = 1.0,
    factor: float = 1.0,
) -> Tensor:  # fmt: skip
    """``factor`` times the sum over the learned tokens of (1 - w) (-log p(token | before it)) + w T^2 KL(p || q).

    p is the teacher and q the student at temperature T (Hinton et al. 2015). Their distributions are those over the
    teacher's k tokens and one more outcome, "another token", so that none of the teacher's probability is lost or blown
    up: coarsening makes this a lower bound of the whole divergence, and k = vocabulary the divergence itself.

    Args:
        logits: [batch, length, vocabulary]. Their gradient has their dtype, and can be asked for once.
        labels: int64 [batch, length], -100 where nothing is learned.
        answers: the teacher's; needed where ``weight`` is above 0.
        weight: w.
        temperature: T, with which ``answers`` were made.

    Returns:
        Float32 [].
    """
    return _InPieces.apply(logits, labels, answers, weight, temperature, factor)


class _InPieces(torch.autograd.Function):
    """Args: as of :func:`training_loss`."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, answers: Answers | None, weight: float, temperature: float,
        factor: float,
    ) -> Tensor:  # fmt: skip
        chosen = learned_positions(labels)
        targets, places = labels[:, 1:][chosen], torch.nonzero(chosen)
        rows = places[:, 0] * logits.shape[1] + places[:, 1]
        flat, wanted = logits.flatten(0, 1), ctx.needs_input_grad[0]
        seed = torch.zeros_like(flat) if wanted else None
        total = torch.zeros((), device=logits.device)
        size = max(1, PIECE_BYTES // (4 * logits.shape[-1]))
        for part in torch.arange(len(rows), device=rows.device).split(size):
            with torch.set_grad_enabled(wanted):
                wide = flat[rows[part]].float().detach().requires_grad_(wanted)
                loss = torch.zeros((), device=logits.device)
                if weight < 1:
                    loss = loss + factor * (1 - weight) * cross_entropy(wide, targets[part], reduction="sum")
                if weight > 0:
                    assert answers is not None
                    loss = loss + factor * weight * _divergence(wide, answers, part, temperature)
            if seed is not None:
                seed[rows[part]] = torch.autograd.grad(loss, wide)[0].to(seed.dtype)
            total += loss.detach()
        if seed is not None:
            ctx.save_for_backward(seed.view_as(logits))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (seed,) = ctx.saved_tensors
        return seed.mul_(grads[0]), None, None, None, None, None


def _divergence(wide: Tensor, answers: Answers, part: Tensor, temperature: float) -> Tensor:
    """T^2 KL(p || q), summed over positions ``part`` of the answers; ``wide``: their logits, float32."""
    scaled = wide if temperature == 1 else wide / temperature
    tokens, teacher = answers.tokens[part], answers.log_probs[part].float()
    student = scaled.gather(1, tokens) - torch.logsumexp(scaled, dim=-1, keepdim=True)
    inside = (teacher.exp() * (teacher - student)).sum()
    if tokens.shape[1] == wide.shape[-1]:
        return temperature**2 * inside
    rest, student_rest = _rest(teacher), _rest(student)
    return temperature**2 * (inside + (rest * (rest.log() - student_rest.log())).sum())


def _rest(log_probs: Tensor) -> Tensor:
    """1 - sum of probabilities, kept off zero where float32 cannot tell."""
    return (1 - log_probs.exp().sum(-1)).clamp(min=1e-6)
