"""Log-likelihoods of continuations given contexts, by the rules of lm-evaluation-harness.

Tokens: spaces at the end of a context move to the front of the continuation; context and continuation are tokenised
together, and the continuation's tokens are those past the number that the context alone has, so that a token is never
split where the model would not see it split. Special tokens are those that the tokenizer adds by itself. An empty
context becomes the BOS token (EOS where there is none). What is longer than the model's positions loses tokens on the
left.

Numbers: log-softmax in float32, sums in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyprune.errors import PyPruneError
from pyprune.evaluation.logits import can_split, logit_pieces
from pyprune.evaluation.resume import Store
from pyprune.importance.modes import evaluating
from pyprune.importance.sources import well_formed
from pyprune.progress import bar

DEFAULT_POSITIONS = 2048
POSITIONS = ("n_positions", "max_position_embeddings", "n_ctx", "max_seq_len")  # by which configurations call them
UNLIMITED = 10**20  # tokenizers without a limit state a huge number

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Likelihood:
    """Sum of log p over a continuation's tokens in nats, and whether each of them was the likeliest one."""

    total: float
    greedy: bool


@dataclass(frozen=True)
class Request:
    """Tokens that the model reads, and those it is asked about: the last ``len(continuation)`` predictions."""

    inputs: Tokens
    continuation: Tokens


def loglikelihoods(
    model: nn.Module, tokenizer: Any, pairs: Sequence[tuple[str, str]], *, batch_size: int = 8,
    store: Store | None = None, label: str = "tasks",
) -> list[Likelihood]:  # fmt: skip
    """log p(continuation | context) for each (context, continuation), in their order.

    Continuations of one context that differ in their last token share a row, so a yes/no question costs one.

    Args:
        model: a causal LM; its mode (train or eval) is restored afterwards.
        batch_size: rows in one forward pass; long ones come first.
        store: keeps what is computed and knows what earlier runs computed.
        label: what the progress bar says.

    Raises:
        PyPruneError: a continuation is empty or longer than the model's positions, the tokenizer has neither BOS nor
            EOS for an empty context, or a log-likelihood is NaN.
    """
    positions = max_positions(model, tokenizer)
    requests = encode_pairs(tokenizer, pairs, positions)
    known: dict[Request, Likelihood] = {}
    rows: dict[Tokens, list[Tokens]] = {}
    for request in dict.fromkeys(requests):
        found = store.get(request.inputs, request.continuation) if store else None
        if found is None:
            rows.setdefault(request.inputs, []).append(request.continuation)
        else:
            known[request] = Likelihood(*found)
    order = sorted(rows, key=lambda ids: (-len(ids), ids))
    with evaluating(model):
        split = bool(order) and can_split(model, torch.tensor(order[:1], device=next(model.parameters()).device))
        with bar(label, len(order)) as line:
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                for request, likelihood in _score(model, batch, rows, split):
                    known[request] = likelihood
                    if store:
                        store.add(request.inputs, request.continuation, likelihood.total, likelihood.greedy)
                if store:
                    store.flush()
                line.advance(len(batch))
    return [known[r] for r in requests]


def encode_pairs(tokenizer: Any, pairs: Sequence[tuple[str, str]], positions: int) -> list[Request]:
    """Requests of at most ``positions`` input tokens."""
    contexts: dict[str, list[int]] = {}
    out = []
    for context, continuation in pairs:
        before, after = _encode_pair(tokenizer, well_formed(context), well_formed(continuation), contexts)
        if not after:
            raise PyPruneError("tasks", continuation, "is a choice without tokens", "Give every choice some text.")
        if len(after) > positions:
            problem = f"is a choice of {len(after)} tokens, and the model knows {positions} positions"
            raise PyPruneError("tasks", continuation, problem, "Leave the question out.")
        out.append(Request(tuple((before + after)[-(positions + 1) :][:-1]), tuple(after)))
    return out


def known_positions(model: Any) -> int | None:
    """How many positions the model knows, where its configuration says so."""
    config = getattr(model, "config", None)
    find = getattr(config, "get_text_config", None)
    config = find() if find is not None else getattr(config, "text_config", None) or config
    for name in POSITIONS:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def max_positions(model: Any, tokenizer: Any = None) -> int:
    """The most tokens that the model reads at once: its configuration's number, else the tokenizer's, else 2048."""
    known = known_positions(model)
    if known is not None:
        return known
    stated = getattr(tokenizer, "model_max_length", None)
    return int(stated) if stated is not None and stated < UNLIMITED else DEFAULT_POSITIONS


def _encode_pair(
    tokenizer: Any, context: str, continuation: str, contexts: dict[str, list[int]]
) -> tuple[list[int], list[int]]:
    """Tokens of a context and of its continuation; ``contexts`` remembers those of contexts alone."""
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if context == "":
        if prefix is None:
            raise PyPruneError(
                "tasks", None, "a context is empty, and the tokenizer has neither BOS nor EOS to put there",
                "Give every question a context.",
            )  # fmt: skip
        ids = tokenizer.encode(continuation, add_special_tokens=False)
        return (ids[:1], ids[1:]) if ids[:1] == [prefix] else ([prefix], ids)
    kept = context.rstrip()
    if not kept:  # nothing but spaces: they are all continuation, and special tokens all context
        kept, continuation = "", context + continuation
    else:
        continuation = context[len(kept) :] + continuation
    mark = tokenizer.decode(prefix) if prefix is not None else None
    if kept not in contexts:
        contexts[kept] = _encode(tokenizer, kept, mark)
    before = contexts[kept]
    after = _encode(tokenizer, kept + continuation, mark)[len(before) :]
    if not before:
        raise PyPruneError("tasks", context, "is a context without tokens", "Give every question some text.")
    return before, after


def _encode(tokenizer: Any, text: str, mark: str | None) -> list[int]:
    """Tokens with the tokenizer's own special tokens, unless the text begins with the first of them."""
    written = mark is not None and text.startswith(mark)
    return list(tokenizer.encode(text, add_special_tokens=False) if written else tokenizer.encode(text))


@torch.no_grad()
def _score(
    model: nn.Module, batch: Sequence[Tokens], rows: dict[Tokens, list[Tokens]], split: bool
) -> list[tuple[Request, Likelihood]]:
    """The likelihoods of one forward pass. Rows are padded on the right, where a causal model does not look."""
    device = next(model.parameters()).device
    ids = torch.zeros(len(batch), max(map(len, batch)), dtype=torch.int64)
    for row, inputs in zip(ids, batch, strict=True):
        row[: len(inputs)] = torch.tensor(inputs)
    ids = ids.to(device)
    asked = [
        (n, inputs, continuation, len(inputs) - len(continuation))
        for n, inputs in enumerate(batch)
        for continuation in rows[inputs]
    ]
    totals, greedy = [0.0] * len(asked), [True] * len(asked)
    start = min(first for *_, first in asked)
    for at, logits in logit_pieces(model, ids, split, start):
        for k, (n, inputs, continuation, first) in enumerate(asked):
            low, high = max(at.start, first), min(at.stop, len(inputs))
            if low < high:
                wanted = torch.tensor(continuation[low - first : high - first], device=device)
                total, best = _of(logits[n, low - at.start : high - at.start], wanted)
                totals[k] += total
                greedy[k] = greedy[k] and best
    if any(math.isnan(t) for t in totals):
        raise PyPruneError(
            "dtype", str(next(model.parameters()).dtype).removeprefix("torch."), "log-likelihoods are not numbers",
            "Use float32 or bfloat16.",
        )  # fmt: skip
    return [
        (Request(inputs, continuation), Likelihood(total, best))
        for (_, inputs, continuation, _), total, best in zip(asked, totals, greedy, strict=True)
    ]


def _of(logits: Tensor, wanted: Tensor) -> tuple[float, bool]:
    logp = logits.float().log_softmax(-1)
    total = logp.gather(1, wanted[:, None]).double().sum().item()
    return total, bool((logits.argmax(-1) == wanted).all())
