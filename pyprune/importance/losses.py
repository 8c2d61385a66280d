"""The loss: next-token cross-entropy, the mean over each sample's own tokens; and its gradient, in little memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyprune.errors import PyPruneError

IGNORED = -100  # label of a position that predicts nothing, as in transformers
OVERFLOW = 1e4  # nats: what a mean that is not finite counts as in reports, since JSON has no such numbers
PIECE_BYTES = 4 << 20  # of wide logits at a time: few enough for the caches


def targets_of(batch: Mapping[str, Any], option: str = "calibration") -> Tensor:
    """What each position predicts: int64 [batch, length], :data:`IGNORED` where nothing.

    Position t predicts label t + 1. Labels are the batch's own, or its ``input_ids``; nothing is predicted from padding
    or into it.

    Raises:
        PyPruneError: a sample predicts nothing, or a label is no token id.
    """
    labels = batch["labels"] if batch.get("labels") is not None else batch["input_ids"]
    wrong = labels[(labels < 0) & (labels != IGNORED)] if not labels.is_floating_point() else labels.flatten()
    if wrong.numel():
        problem = f"holds label {wrong[0].item()}, which is no token"
        raise PyPruneError(option, "labels of a batch", problem, f"Give token ids, and {IGNORED} where nothing counts.")
    targets = torch.full_like(labels, IGNORED, dtype=torch.int64)
    targets[:, :-1] = labels[:, 1:]
    mask = batch.get("attention_mask")
    if mask is not None and mask.dim() == 2 and mask.shape == labels.shape:
        real = mask != 0
        targets[:, :-1].masked_fill_(~(real[:, 1:] & real[:, :-1]), IGNORED)
    barren = (targets == IGNORED).all(1).nonzero().flatten().tolist()
    if barren:
        raise PyPruneError(
            option, f"sample {barren[0]} of a batch", "has no token to predict", "Give sequences of 2 tokens or more."
        )
    return targets


class NotFinite(Exception):
    """The sums of a parameter hold NaN or infinity, or, where ``parameter`` is None, the loss."""

    def __init__(self, parameter: str | None = None) -> None:
        super().__init__(parameter)
        self.parameter = parameter


def check_losses(losses: Sequence[Tensor]) -> Tensor:
    """All losses in one tensor. Raises NotFinite when one is NaN or infinite."""
    joined = torch.cat(list(losses))
    if not bool(joined.isfinite().all()):
        raise NotFinite
    return joined


def logits_of(out: Any) -> Tensor:
    """The logits [batch, length, vocabulary] in what a causal LM returns."""
    logits = getattr(out, "logits", None)
    if logits is None:
        logits = out[0] if isinstance(out, (tuple, list)) else out
    if not isinstance(logits, Tensor):
        kind = type(out).__name__
        raise PyPruneError("model", kind, "is returned in place of logits", "Give a model with a causal-LM head.")
    return logits


@torch.no_grad()
def loss_and_seed(logits: Tensor, targets: Tensor, factor: float, overwrite: bool = False) -> tuple[Tensor, Tensor]:
    """Each sample's loss, and the gradient of ``factor`` times their sum with respect to the logits.

    Wide (float32, or float64 for float64 logits) copies exist for a few rows at a time only.

    Args:
        logits: [batch, length, vocabulary].
        targets: int64 [batch, length], from :func:`targets_of`.
        factor: applied before rounding to the logits' type.
        overwrite: nobody reads the logits any more. The gradient takes their place, if they come straight from a matrix
            product, whose backward pass has no need of them.

    Returns:
        (losses [batch] float32 or wider, seed [batch, length, vocabulary] in the logits' type).
    """
    if logits.shape[:-1] != targets.shape:
        raise PyPruneError(
            "model", list(logits.shape), f"are logits that do not fit labels {list(targets.shape)}",
            "Give labels of the logits' length.",
        )  # fmt: skip
    targets = targets.to(logits.device)
    vocabulary = logits.shape[-1]
    flat, wanted = logits.reshape(-1, vocabulary), targets.reshape(-1)
    counts = (targets != IGNORED).sum(1, keepdim=True)
    wide_type = torch.promote_types(flat.dtype, torch.float32)
    weight = (factor / counts.to(wide_type)).expand_as(targets).reshape(-1)
    in_place = overwrite and logits.is_contiguous() and _result_of_product(logits)
    seed = flat.detach() if in_place else torch.empty_like(flat)
    nll = torch.empty_like(weight)
    step = max(1, PIECE_BYTES // (4 * vocabulary))
    for start in range(0, flat.shape[0], step):
        rows = slice(start, start + step)
        real = wanted[rows] != IGNORED
        column = wanted[rows].clamp(min=0)[:, None]
        p = torch.log_softmax(flat[rows], dim=-1, dtype=wide_type)
        nll[rows] = -p.gather(1, column)[:, 0] * real
        p.exp_().scatter_add_(1, column, p.new_full((), -1.0).expand_as(column))
        torch.mul(p, (weight[rows] * real)[:, None], out=seed[rows])
    return nll.view(targets.shape).sum(1) / counts[:, 0], seed.view(logits.shape)


def _result_of_product(logits: Tensor) -> bool:
    """Whether the node that made it keeps nothing of its result."""
    return type(logits.grad_fn).__name__ in ("_LinearBackward", "UnsafeViewBackward0", "MmBackward0", "AddmmBackward0")
