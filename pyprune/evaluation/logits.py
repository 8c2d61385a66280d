"""Logits in pieces, so that a [tokens, vocabulary] matrix never exists as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

PIECE_BYTES = 64 * 2**20  # float32 logits of one piece


def logit_pieces(model: nn.Module, ids: Tensor, split: bool, start: int = 0) -> Iterator[tuple[slice, Tensor]]:
    """Logits of ``ids`` from position ``start`` on, piece by piece along the sequence.

    Args:
        model: a causal LM in eval mode.
        ids: int64 [batch, length] on the model's device.
        split: what :func:`can_split` said; False computes the whole matrix and yields it once.

    Yields:
        (positions, logits [batch, positions, vocabulary] in the model's dtype).
    """
    if not split:
        yield slice(start, ids.shape[1]), _logits(model(input_ids=ids, use_cache=False))[:, start:]
        return
    decoder = model.get_decoder()  # type: ignore[operator]
    out = decoder(input_ids=ids, use_cache=False)
    hidden = out[0]
    rows = max(1, PIECE_BYTES // (4 * ids.shape[0] * _vocabulary(model)))
    for first in range(start, ids.shape[1], rows):
        at = slice(first, min(first + rows, ids.shape[1]))
        with _decoder_returning(decoder, _with_hidden(out, hidden[:, at])):
            yield at, _logits(model(input_ids=ids[:, at], use_cache=False))


@torch.no_grad()
def can_split(model: nn.Module, ids: Tensor) -> bool:
    """Whether the model's own head, run on pieces of its decoder's output, gives the logits of the whole model.

    Tried on the first tokens of ``ids`` [1, length], since nothing in a model's class says it. Scaling, soft-capping
    and whatever else the head's half of ``forward`` does are thereby the model's own.
    """
    probe = ids[:, :8]
    whole = _logits(model(input_ids=probe, use_cache=False))
    try:
        decoder = model.get_decoder()  # type: ignore[operator]
        out = decoder(input_ids=probe, use_cache=False)
        pieces = []
        for at in (slice(0, 3), slice(3, probe.shape[1])):
            with _decoder_returning(decoder, _with_hidden(out, out[0][:, at])):
                pieces.append(_logits(model(input_ids=probe[:, at], use_cache=False)))
        joined = torch.cat(pieces, dim=1)
    except (AttributeError, TypeError, IndexError, KeyError, RuntimeError, ValueError):
        return False
    tolerance = 1e-4 if whole.dtype == torch.float32 else 3e-2
    return joined.shape == whole.shape and torch.allclose(joined, whole, rtol=tolerance, atol=tolerance)


@contextmanager
def _decoder_returning(decoder: nn.Module, out: Any) -> Iterator[None]:
    own = decoder.__dict__.get("forward")  # one that somebody gave this very object
    decoder.forward = lambda *args, **kwargs: out
    try:
        yield
    finally:
        del decoder.forward
        if own is not None:
            decoder.forward = own


def _with_hidden(out: Any, hidden: Tensor) -> Any:
    if isinstance(out, tuple):
        return (hidden, *out[1:])
    return type(out)(**{**out, "last_hidden_state": hidden})


def _logits(out: Any) -> Tensor:
    return out.logits if hasattr(out, "logits") else out[0] if isinstance(out, tuple) else out


def _vocabulary(model: nn.Module) -> int:
    head = model.get_output_embeddings()  # type: ignore[operator]
    return int(head.weight.shape[0])
