"""Perplexity with its protocol.

The text is tokenised once and cut into non-overlapping windows of ``length`` tokens. In each window tokens 2..n are
scored given those before them in the same window:

    perplexity = exp( -1/N * sum over windows, sum_{t=2..n} log p(x_t | x_1 .. x_{t-1}) ),   N = windows * (length - 1)

Windows may begin with tokens that belong to no text (BOS); these are read and not scored. A figure means nothing
without the text, the length and the number of windows, so :class:`Perplexity` carries them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pyprune.errors import PyPruneError
from pyprune.evaluation.logits import can_split, logit_pieces
from pyprune.evaluation.protocols import PROTOCOLS
from pyprune.importance.calibration import check_ids
from pyprune.importance.losses import IGNORED, OVERFLOW
from pyprune.importance.modes import evaluating
from pyprune.importance.sources import check_tokens, read_tokens
from pyprune.progress import track


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and how it was measured.

    Attributes:
        perplexity: exp(nll); infinite when it overflows.
        nll: mean negative log-likelihood of a scored token, in nats; 10,000 where logits are NaN or infinite.
        tokens: tokens scored.
        windows: windows read.
        length: tokens in a window, what it begins with included.
        text: name of the text.
        dtype: type of the weights that were run.
        special_tokens: whether the text was tokenised with the tokenizer's special tokens.
        name: the named protocol that was asked for, if one was.
        prefix: tokens that every window begins with and that are not scored.
    """

    perplexity: float
    nll: float
    tokens: int
    windows: int
    length: int
    text: str
    dtype: str
    special_tokens: bool = False
    name: str | None = None
    prefix: int = 0

    @property
    def protocol(self) -> str:
        special = "the tokenizer's special tokens" if self.special_tokens else "no special tokens"
        if self.prefix:
            special = "each begun as the tokenizer begins texts"
        named = f", protocol {self.name}" if self.name else ""
        return (
            f"{self.text}: {self.windows} windows of {self.length} tokens, no overlap, {special}, "
            f"tokens {max(1, self.prefix) + 1}..{self.length} scored ({self.tokens:,}), {self.dtype}{named}"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable; a perplexity that overflows is None there, its ``nll`` still a number."""
        shown = self.perplexity if math.isfinite(self.perplexity) else None
        return {**asdict(self), "perplexity": shown, "protocol": self.protocol}


def cut_windows(tokens: Tensor, length: int, windows: int | None = None, text: str = "text") -> Tensor:
    """The first ``windows`` non-overlapping windows (all of them for None) of a token stream.

    Args:
        tokens: int64, flattened to one stream; a [windows, length] tensor therefore stays as it is.

    Returns:
        int64 [windows, length].

    Raises:
        PyPruneError: the text is too short.
    """
    stream = tokens.reshape(-1).to(torch.int64)
    have = stream.numel() // length
    if have == 0:
        raise PyPruneError(
            "eval_text", text, f"has {stream.numel()} tokens, too few for one window of {length}",
            "Give more text or a smaller eval_length.",
        )  # fmt: skip
    if windows is not None and have < windows:
        raise PyPruneError(
            "eval_windows", windows, f"is more than {text} holds: {have} windows of {length} tokens",
            f"Ask for at most {have}, or give more text.",
        )  # fmt: skip
    count = have if windows is None else windows
    return stream[: count * length].reshape(count, length)


def read_windows(
    source: Any, tokenizer: Any = None, *, length: int, windows: int | None = None, field: str = "text",
    special_tokens: bool = False,
) -> tuple[Tensor, str]:  # fmt: skip
    """Windows [windows, length] of a text, and its name.

    Args:
        source: a file or dataset name as for calibration, read in its own order and tokenised once; or token ids.
        tokenizer: needed for text.
        field: field of the records that holds the text.
        special_tokens: tokenise with the tokenizer's own special tokens; token ids stay as they are.

    Raises:
        PyPruneError: the source cannot be read or is too short.
    """
    if isinstance(source, str):
        name = os.path.basename(source) or source
        stream = read_tokens(source, tokenizer, field, "eval_text", special_tokens)
        return cut_windows(stream, length, windows, name), name
    tokens = check_tokens(torch.as_tensor(source), "token ids", "eval_text")
    return cut_windows(tokens, length, windows, "token ids"), "token ids"


@torch.no_grad()
def perplexity(
    model: nn.Module, windows: Tensor, *, text: str = "text", batch_size: int = 1, label: str = "perplexity",
    protocol: str | None = None, prefix: Sequence[int] = (),
) -> Perplexity:  # fmt: skip
    """Perplexity of ``model`` on windows of tokens.

    Logits exist for a piece of the sequence at a time (64 MiB in float32) where the model's head can be run on pieces.
    Log-likelihoods are float32, their sum float64.

    Args:
        model: a causal LM; its mode (train or eval) is restored afterwards.
        windows: int64 [windows, length], as :func:`cut_windows` makes them.
        text: name of the text, for the protocol.
        batch_size: windows in one forward pass.
        label: what the progress bar says.
        protocol: name of the protocol that made the windows, one of :data:`PROTOCOLS`.
        prefix: token ids that every window is begun with.

    Raises:
        PyPruneError: a window holds an id outside the vocabulary.
    """
    weight = next(model.parameters())
    own = torch.tensor(prefix, dtype=torch.int64)
    windows = torch.cat([own.expand(len(windows), -1), windows], dim=1)
    rows = getattr(model.get_input_embeddings(), "num_embeddings", None)  # type: ignore[operator]
    if rows is not None:
        check_ids(windows, rows, "eval_text", text)
    with evaluating(model):
        split = can_split(model, windows[:1].to(weight.device))
        total = 0.0
        for batch in track(windows.split(batch_size), label):
            ids = batch.to(weight.device)
            targets = ids.clone()
            targets[:, : len(own)] = IGNORED
            for at, logits in logit_pieces(model, ids, split):
                total += _nll(logits, targets, at)
    scored = windows.shape[0] * (windows.shape[1] - max(1, len(own)))
    mean = total / scored
    if not math.isfinite(mean):  # logits that overflow in the weights' type
        mean = OVERFLOW
    return Perplexity(
        perplexity=math.exp(mean) if mean < 700 else math.inf,
        nll=mean,
        tokens=scored,
        windows=windows.shape[0],
        length=windows.shape[1],
        text=text,
        dtype=str(weight.dtype).removeprefix("torch."),
        special_tokens=protocol is not None and PROTOCOLS[protocol].special_tokens,
        name=protocol,
        prefix=len(own),
    )


def _nll(logits: Tensor, targets: Tensor, at: slice) -> float:
    """Sum of -log p of the targets that the logits at positions ``at`` predict; the last position predicts none."""
    total = 0.0
    for row, wanted in zip(logits, targets[:, at.start + 1 : at.stop + 1], strict=True):
        for part, goal in zip(row[: wanted.numel()].split(512), wanted.split(512), strict=True):
            total += cross_entropy(part.float(), goal, reduction="sum").double().item()
    return total
