"""Part of a large vocabulary: logits of the tokens that may follow, where those of all cost more than the layers do.

Both distributions of a divergence are then those given that one of these tokens follows. Tokens of other languages tell
little of what a cut did to a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from pyprune.importance.divergence import pieces
from pyprune.importance.inputs import read_product
from pyprune.importance.steps import Forward, Step

WORDS = 65536
SAMPLES = 16  # passes that show which tokens may follow, about
PROBED = 16  # tokens of text on which it is tried whether logits are the head's alone
NEAR = 0.02  # how far logits may be apart that are to be the same: a product of fewer columns is rounded otherwise


def head_of(model: nn.Module) -> nn.Parameter | None:
    """The weight [vocabulary, hidden] that logits are formed with, if the model names it."""
    named = getattr(model, "get_output_embeddings", None)
    weight = getattr(named() if callable(named) else None, "weight", None)
    return weight if isinstance(weight, nn.Parameter) else None


def mass(logits: Tensor) -> Tensor:
    """Sum over the rows of the probability of each token, float64 [vocabulary]."""
    return sum((piece.float().softmax(-1).sum(0, dtype=torch.float64) for piece in pieces(logits)), torch.zeros(()))


@torch.no_grad()
def likely(forward: Forward, steps: Sequence[Step]) -> Tensor | None:
    """The ``WORDS`` tokens that the model gives most probability, int64 in order, over some of ``steps``.

    None where all tokens are to take part: there are no more; their logits in one pass, with a gradient, are smaller
    than a second head would be; or logits are made of more than the head.
    """
    head = head_of(forward.model)
    if head is None or head.dim() != 2 or head.shape[0] <= WORDS:
        return None
    tokens = max(s.targets.numel() for s in steps)
    if 2 * tokens * (head.shape[0] - WORDS) < WORDS * head.shape[1]:
        return None
    shown = range(0, len(steps), max(1, len(steps) // SAMPLES))
    total = torch.zeros((), device=head.device)
    for k in shown:
        total = total + mass(forward(steps[k]).flatten(0, -2))
    words = total.topk(WORDS).indices.sort().values
    return words if can_narrow(forward, words, steps[0]) else None


@torch.no_grad()
def can_narrow(forward: Forward, words: Tensor, step: Step) -> bool:
    """Whether the model, narrowed to ``words``, gives the logits that it gives of them otherwise; tried on a sample.

    Not where logits are made of more than the head: a bias of their own, tokens that are masked, a fixed shape.
    """
    head = head_of(forward.model)
    if head is None:
        return False

    def logits() -> Tensor:
        return forward(step.part(slice(0, 1))).flatten(0, -2)[-PROBED:].clone()

    full = logits()
    if full.shape[-1] != head.shape[0]:
        return False
    # First with as many tokens as ever, each in its neighbour's place: what is done to a token by its number shows
    # itself, and on a GPU a number out of range would end the process.
    with _AtHead(head, lambda x, bias: linear(x, head, bias).roll(1, -1)):
        turned = logits()
    if not _same(turned, full.roll(1, -1)):
        return False
    try:
        with narrowed(forward.model, words):
            return _same(logits(), full[:, words])
    except (RuntimeError, IndexError):
        return False


def _same(found: Tensor, wanted: Tensor) -> bool:
    near = NEAR * float(wanted.float().abs().median())
    return found.shape == wanted.shape and torch.allclose(found.float(), wanted.float(), rtol=NEAR, atol=near)


def narrowed(model: nn.Module, words: Tensor | None) -> AbstractContextManager[Any]:
    """Within it, entered as often as need be, ``model`` gives the logits of ``words`` alone; of all tokens for None."""
    head = head_of(model)
    if words is None or head is None:
        return nullcontext()
    few = head.detach()[words]
    return _AtHead(head, lambda x, bias: linear(x, few, None if bias is None else bias[words]))


class _AtHead(TorchFunctionMode):
    """Within it, as a context manager, products with ``head`` are what ``made`` gives of their input and bias."""

    def __init__(self, head: nn.Parameter, made: Callable[[Tensor, Tensor | None], Tensor]) -> None:
        super().__init__()
        self.head, self.made = head, made

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        found = read_product(func, args, kwargs or {})
        if found is None or found[1] is not self.head or found[3]:
            return func(*args, **(kwargs or {}))
        return self.made(found[0], found[2])
