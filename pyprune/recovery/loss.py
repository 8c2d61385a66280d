"""The loss: cross-entropy on the text, and the divergence from the teacher's most likely tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pyprune.recovery.packing import IGNORED


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


def text_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over the learned tokens of -log p(token | before it); float32.

    Args:
        logits: [batch, length, vocabulary].
        labels: int64 [batch, length], -100 where nothing is learned.
    """
    chosen = learned_positions(labels)
    return cross_entropy(logits[:, :-1][chosen].float(), labels[:, 1:][chosen], reduction="sum")


def teacher_answers(logits: Tensor, labels: Tensor, k: int, temperature: float) -> Answers:
    """The teacher's k most likely tokens and log softmax(z / T) there."""
    scaled = logits[:, :-1][learned_positions(labels)].float() / temperature
    top = scaled.topk(min(k, scaled.shape[-1]), dim=-1)
    return Answers(top.indices, top.values - torch.logsumexp(scaled, dim=-1, keepdim=True))


def teacher_loss(logits: Tensor, labels: Tensor, answers: Answers, temperature: float) -> Tensor:
    """Sum over positions of T^2 KL(p || q), p the teacher and q the student at temperature T (Hinton et al. 2015).

    The distributions are those over the teacher's k tokens and one more outcome, "another token", so that none of the
    teacher's probability is lost or blown up: coarsening makes this a lower bound of the whole divergence, and k =
    vocabulary the divergence itself.
    """
    scaled = logits[:, :-1][learned_positions(labels)].float() / temperature
    student = scaled.gather(1, answers.tokens) - torch.logsumexp(scaled, dim=-1, keepdim=True)
    teacher = answers.log_probs.float()
    inside = (teacher.exp() * (teacher - student)).sum()
    if answers.tokens.shape[1] == logits.shape[-1]:
        return temperature**2 * inside
    rest, student_rest = _rest(teacher), _rest(student)
    return temperature**2 * (inside + (rest * (rest.log() - student_rest.log())).sum())


def _rest(log_probs: Tensor) -> Tensor:
    """1 - sum of probabilities, kept off zero where float32 cannot tell."""
    return (1 - log_probs.exp().sum(-1)).clamp(min=1e-6)
