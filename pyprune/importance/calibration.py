"""Calibration: the batches that importance is measured on, from text, records, datasets, token ids or ready batches."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyprune.errors import PyPruneError
from pyprune.importance.losses import IGNORED
from pyprune.importance.sources import (
    asked_prefix,
    behind_prefix,
    check_tokens,
    encode,
    kind_of,
    read_documents,
    read_token_file,
)

SAMPLES, LENGTH = 128, 512  # what is taken of a text when nothing is said and it has as much
BETWEEN = "\n\n"  # documents are joined by blank lines
SPREAD = 8  # documents are read up to so many times the tokens asked for, and samples lie evenly over them
LEAST = 2  # tokens of a sequence: one to read, one to predict
SCORE_LENGTH = 128  # tokens in a sample where score_tokens is given: what per-sample gradients are summed over
FEW, SHORT = 32, 128  # of a shorter text sequences are shortened down to this, so that there are not fewer


@dataclass(frozen=True)
class Calibration:
    """Batches, and where they come from.

    Attributes:
        batches: keyword arguments of the model's forward pass: ``input_ids`` int64 [batch, length], optionally
            ``attention_mask`` [batch, length] and ``labels`` [batch, length], -100 where nothing is predicted.
        source: name of the text, or what kind of Python object it was.
        samples: sequences in all batches.
        length: tokens of the longest sequence, padding included.
        tokens: tokens in all sequences, padding excluded.
        seed: what the crops were drawn with, or None where nothing was drawn.
        prefix: tokens at the beginning of every sequence that the tokenizer puts before a text, such as BOS.
    """

    batches: tuple[dict[str, Any], ...]
    source: str
    samples: int
    length: int
    tokens: int
    seed: int | None = None
    prefix: int = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)

    def to_dict(self) -> dict[str, Any]:
        """What a report says of it; JSON-serialisable."""
        return {
            "source": self.source, "samples": self.samples, "length": self.length, "tokens": self.tokens,
            "seed": self.seed, "batches": len(self.batches), "prefix": self.prefix,
        }  # fmt: skip

    def __str__(self) -> str:
        drawn = "" if self.seed is None else f", seed {self.seed}"
        return f"{self.source}: {self.samples} samples of {self.length} tokens{drawn}"


def load_calibration(
    source: Any,
    tokenizer: Any = None,
    *,
    samples: int | None = None,
    length: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
    field: str = "text",
    option: str = "calibration",
    longest: int | None = None,
    bos: bool = False,
) -> Calibration:
    """Calibration batches from whatever ``source`` is.

    - A text file: random crops that do not overlap.
    - A JSONL file, or a dataset (``owner/name:configuration:split``): its documents in random order, joined by blank
      lines to one stream, and samples evenly over it.
    - Token ids [N, T], as a tensor, an array, or a .npy or .safetensors file: the first ``samples`` rows, the first
      ``length`` tokens of each. Token ids [T] are cropped as a text.
    - Any iterable of batches (mappings, or token ids [batch, length]): taken as they are, until there are ``samples``
      sequences. They keep their own length and batch size.

    With ``bos``, every sample of a text begins with what the tokenizer puts before texts, within its ``length``.

    Args:
        source: see above. A :class:`Calibration` is returned unchanged.
        tokenizer: a Hugging Face tokenizer; needed for text.
        samples: sequences. None: of a text 128, or as many as it gives; all of anything else.
        length: tokens of each. None: of a text 512, shorter (down to 128) where it would not give 32 of them; all of
            token ids.
        batch_size: sequences in a batch.
        seed: what the crops are drawn with.
        field: field of the records that holds the text.
        option: which option the source came from, for errors.
        longest: the most that ``length`` is when nothing is said, as the positions that the model knows.
        bos: begin samples of a text as the tokenizer begins texts, with a BOS token.

    Raises:
        PyPruneError: a source that is missing, empty, unreadable or too short for the samples asked; ``bos`` where the
            tokenizer puts nothing before texts.
    """
    for name, value in (("samples", samples), ("length", length), ("batch_size", batch_size)):
        if value is not None and value < (2 if name == "length" else 1):
            raise PyPruneError(name, value, f"must be at least {2 if name == 'length' else 1}")
    if isinstance(source, Calibration):
        return source
    if isinstance(source, (str, os.PathLike)):
        return _from_name(os.fspath(source), tokenizer, samples, length, batch_size, seed, field, option, longest, bos)
    if isinstance(source, np.ndarray):
        source = torch.from_numpy(source)
    if isinstance(source, Tensor):
        return _from_tokens(source, "token ids", samples, length, batch_size, seed, option, longest)
    if isinstance(source, Mapping):
        source = [source]
    if not isinstance(source, Iterable):
        raise PyPruneError(
            option, type(source).__name__, "is nothing to calibrate on", "Give text, token ids or batches."
        )
    return _from_batches(source, samples, option)


def check_vocabulary(calibration: Calibration, model: nn.Module, option: str = "calibration") -> None:
    """Every token id has a row in the model's embedding.

    Raises:
        PyPruneError: an id is negative or too large, as when the text was tokenised for another model.
    """
    find = getattr(model, "get_input_embeddings", None)
    rows = getattr(find() if find is not None else None, "num_embeddings", None)
    if rows is None:
        return
    for batch in calibration:
        for ids, least in ((batch.get("input_ids"), 0), (batch.get("labels"), None)):
            if isinstance(ids, Tensor):
                check_ids(ids, rows, option, calibration.source, least)


def check_ids(ids: Tensor, vocabulary: int, option: str, value: Any, least: int | None = 0) -> None:
    """Raises PyPruneError when a token id is below ``least`` or has no row among ``vocabulary``."""
    low, high = (int(ids.min()), int(ids.max())) if ids.numel() else (0, 0)
    below = least is not None and low < least
    if below or high >= vocabulary:
        problem = f"holds token id {low if below else high}, and the model's vocabulary has {vocabulary} tokens"
        raise PyPruneError(option, value, problem, "Tokenise it with this model's own tokenizer.")


def _from_name(
    source: str, tokenizer: Any, samples: int | None, length: int | None, size: int, seed: int, field: str, option: str,
    longest: int | None, bos: bool,
) -> Calibration:  # fmt: skip
    kind = kind_of(source, option)
    name = os.path.basename(source) if kind != "dataset" else source
    if kind == "tokens":
        return _from_tokens(read_token_file(source, option), name, samples, length, size, seed, option, longest)
    if kind == "text":
        rng = torch.Generator().manual_seed(seed)
        text = next(read_documents(source, field, None, option))
        ids = encode(tokenizer, text, source, option)
        count, long = _sizes(ids, samples, length, longest)
        prefix = asked_prefix(tokenizer, "bos") if bos else []
        rows = _crops(ids, count, behind_prefix(prefix, long, "length"), rng, name, option)
        return _pack(rows, name, size, seed, prefix)
    # A dataset may be endless and a file large: no more documents than samples are spread over.
    parts, have = [], 0
    enough = SPREAD * (samples or SAMPLES) * (length or min(LENGTH, longest or LENGTH))
    for document in read_documents(source, field, seed, option):
        parts.append(encode(tokenizer, document + BETWEEN, source, option))
        have += parts[-1].numel()
        if have >= enough:
            break
    stream = torch.cat(parts)
    count, long = _sizes(stream, samples, length, longest)
    prefix = asked_prefix(tokenizer, "bos") if bos else []
    long = behind_prefix(prefix, long, "length")
    _check_enough(stream, count, long, name, option)
    rows = stream[: have // long * long].view(-1, long)
    return _pack(rows[torch.arange(count) * (len(rows) - 1) // max(1, count - 1)], name, size, seed, prefix)


def _sizes(tokens: Tensor, samples: int | None, length: int | None, longest: int | None) -> tuple[int, int]:
    """Samples and length for a stream; what was not asked for is what the stream gives."""
    have = tokens.numel()
    if length is None:
        length = min(LENGTH, longest or LENGTH)
        if have < length * (samples or FEW):  # more of shorter ones are better than few
            length = max(min(length, SHORT), have // (samples or FEW))
        if have < length * (samples or 1):
            length = max(LEAST, have // (samples or 1))
    return samples or max(1, min(SAMPLES, have // length)), length


def _crops(tokens: Tensor, samples: int, length: int, rng: torch.Generator, source: str, option: str) -> Tensor:
    """Random rows [samples, length] of a stream [tokens], none overlapping, in random order."""
    _check_enough(tokens, samples, length, source, option)
    have, need = tokens.numel(), samples * length
    # Sorted offsets in the slack, each then shifted by the crops before it: uniform over all such placements.
    slack = torch.randint(have - need + 1, (samples,), generator=rng).sort().values
    starts = slack + torch.arange(samples) * length
    starts = starts[torch.randperm(samples, generator=rng)]
    return tokens[starts[:, None] + torch.arange(length)]


def _check_enough(tokens: Tensor, samples: int, length: int, source: str, option: str) -> None:
    """Raises PyPruneError when a stream [tokens] is shorter than that many samples of that length."""
    have, need = tokens.numel(), samples * length
    if have < need:
        fits = have // length
        way = f"Ask for at most samples={fits}" if fits else "Ask for a smaller length"
        raise PyPruneError(
            option, source, f"has {have} tokens, and {samples} samples of {length} need {need}",
            f"{way}, or give more text." if have >= LEAST else "Give more text.",
        )  # fmt: skip


def _from_tokens(
    tokens: Tensor, name: str, samples: int | None, length: int | None, size: int, seed: int, option: str,
    longest: int | None,
) -> Calibration:  # fmt: skip
    tokens = check_tokens(tokens.detach().cpu(), name, option)
    if tokens.dim() == 1:
        rng = torch.Generator().manual_seed(seed)
        sizes = _sizes(tokens, samples, length, longest)
        return _pack(_crops(tokens, *sizes, rng, name, option), name, size, seed)
    have, long = tokens.shape
    if (samples or 0) > have or (length or 0) > long:
        raise PyPruneError(
            option, name, f"holds {have} samples of {long} tokens, not {samples or have} of {length or long}",
            f"Ask for at most samples={have} and length={long}, or give more token ids.",
        )  # fmt: skip
    return _pack(tokens[:samples, :length], name, size, None)


def _pack(rows: Tensor, source: str, size: int, seed: int | None, prefix: Sequence[int] = ()) -> Calibration:
    rows = torch.cat([torch.tensor(prefix, dtype=rows.dtype).expand(len(rows), -1), rows], dim=1)
    if rows.shape[1] < 2:
        raise PyPruneError("length", rows.shape[1], "leaves nothing to predict", "Give sequences of 2 tokens or more.")
    batches = tuple({"input_ids": part.contiguous()} for part in rows.split(size))
    return Calibration(batches, source, rows.shape[0], rows.shape[1], rows.numel(), seed, len(prefix))


def _from_batches(source: Iterable[Any], samples: int | None, option: str) -> Calibration:
    batches: list[dict[str, Any]] = []
    total = tokens = length = 0
    for i, item in enumerate(source):
        batch = _batch(item, i, option)
        rows = batch_rows(batch)
        if samples is not None and total + rows > samples:
            batch, rows = take(batch, slice(0, samples - total)), samples - total
        batches.append(batch)
        total += rows
        length = max(length, _sized(batch).shape[1])
        tokens += _real_tokens(batch)
        if total == samples:
            break
    if not batches:
        raise PyPruneError(option, None, "holds no batches", "Give at least one.")
    if samples is not None and total < samples:
        raise PyPruneError(
            option, None, f"holds {total} samples, and {samples} were asked", f"Ask for at most samples={total}."
        )
    return Calibration(tuple(batches), "batches", total, length, tokens)


def _batch(item: Any, number: int, option: str) -> dict[str, Any]:
    name = f"batch {number}"
    if isinstance(item, (list, tuple)) and len(item) == 1 and isinstance(item[0], (Tensor, np.ndarray)):
        item = item[0]  # as a TensorDataset of token ids has them
    if isinstance(item, Mapping):
        try:
            batch = {k: torch.as_tensor(v) if isinstance(v, (list, np.ndarray)) else v for k, v in item.items()}
        except (ValueError, TypeError) as error:
            raise PyPruneError(option, name, f"is not of tensors: {error}", "Pad its lists to one length.") from None
        if "input_ids" in batch:
            ids = batch["input_ids"] = check_tokens(torch.as_tensor(batch["input_ids"]), name, option)
            if ids.dim() == 1:  # one sequence without a batch dimension
                batch = {k: v[None] if isinstance(v, Tensor) else v for k, v in batch.items()}
        elif not isinstance(batch.get("labels"), Tensor):
            raise PyPruneError(
                option, name, "has neither input_ids nor labels", f"It has: {', '.join(map(str, batch))}."
            )
        _check_mask(batch, name, option)
        return {k: v for k, v in batch.items() if k != "use_cache"}  # nothing is generated
    if isinstance(item, (Tensor, np.ndarray)) or (isinstance(item, list) and item and not isinstance(item[0], Tensor)):
        ids = check_tokens(torch.as_tensor(item), name, option)
        return {"input_ids": ids if ids.dim() == 2 else ids[None]}
    kind = type(item).__name__
    raise PyPruneError(option, name, f"is a {kind}", "Batches are mappings of tensors, or token ids [batch, length].")


def _check_mask(batch: Mapping[str, Any], name: str, option: str) -> None:
    """A mask of padding has one entry for each token."""
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if isinstance(ids, Tensor) and isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape != ids.shape:
        problem = f"has an attention_mask of {list(mask.shape)} beside input_ids of {list(ids.shape)}"
        raise PyPruneError(option, name, problem, "Give a mask of the same shape.")


def batch_rows(batch: Mapping[str, Any]) -> int:
    """Sequences in a batch."""
    return int(_sequences(batch).shape[0])


def batch_tokens(batch: Mapping[str, Any]) -> int:
    """Tokens in a batch, padding included."""
    return int(_sequences(batch).numel())


def _sequences(batch: Mapping[str, Any]) -> Tensor:
    return batch["input_ids"] if "input_ids" in batch else batch["labels"]


def _sized(batch: Mapping[str, Any]) -> Tensor:
    """A tensor of the batch that has its sequences and their length."""
    return next(t for t in (batch.get("input_ids"), *batch.values()) if isinstance(t, Tensor) and t.dim() > 1)


def _real_tokens(batch: Mapping[str, Any]) -> int:
    """Tokens in a batch, padding excluded."""
    mask = batch.get("attention_mask")
    full = isinstance(mask, Tensor) and mask.dim() == 2
    return int((mask != 0).sum()) if full else batch_rows(batch) * _sized(batch).shape[1]  # type: ignore[union-attr]


def first_tokens(calibration: Calibration, tokens: int, length: int | None = None) -> Calibration:
    """The first sequences that together have ``tokens`` tokens, padding included; all when there are fewer.

    Args:
        length: cut them into samples of at most so many tokens, by :func:`in_pieces`; None leaves them whole.

    Raises:
        PyPruneError: nothing in these tokens can be predicted.
    """
    asked = tokens
    batches: list[dict[str, Any]] = []
    for batch in calibration:
        if tokens <= 0:
            break
        rows = batch_rows(batch)
        wanted = min(rows, -(-tokens * rows // batch_tokens(batch)))
        part = take(batch, slice(0, wanted))
        batches += [part] if length is None else in_pieces(part, length, calibration.prefix)
        tokens -= batch_tokens(part)
    if not batches:
        raise PyPruneError("score_tokens", asked, "hold no token to predict", "Give more of them, or other text.")
    samples, real = sum(batch_rows(b) for b in batches), sum(_real_tokens(b) for b in batches)
    longest = max(batch_tokens(b) // batch_rows(b) for b in batches)
    return replace(calibration, batches=tuple(batches), samples=samples, tokens=real, length=longest)


def in_pieces(batch: Mapping[str, Any], length: int, prefix: int = 0) -> list[dict[str, Any]]:
    """A batch of token ids, masks and labels [batch, tokens], cut along the tokens into pieces [<= batch, <= length].

    Every piece begins with the first ``prefix`` tokens of its sequences. Sequences with nothing to predict in a piece
    are left out of it. A batch that holds anything else is not cut.
    """
    if not set(batch) <= {"input_ids", "attention_mask", "labels"}:
        return [dict(batch)]
    out = []
    for start in range(prefix, batch["input_ids"].shape[1], max(1, length - prefix)):
        end = start + max(1, length - prefix)
        piece = {k: torch.cat([v[:, :prefix], v[:, start:end]], dim=1) for k, v in batch.items() if v is not None}
        real = piece.get("attention_mask", torch.ones_like(piece["input_ids"])) != 0
        told = real[:, 1:] & real[:, :-1]
        if "labels" in piece:
            told = told & (piece["labels"][:, 1:] != IGNORED)
        rows = told.any(1)
        if bool(rows.any()):
            out.append({k: v[rows] for k, v in piece.items()})
    return out


def single_rows(calibration: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A batch of each sequence, in order."""
    return [take(b, slice(r, r + 1)) for b in calibration for r in range(batch_rows(b))]


def evenly(count: int, of: int) -> set[int]:
    """``count`` of the numbers below ``of``, as far apart as they can be; fewer where there are no more."""
    return {of * (2 * k + 1) // (2 * count) for k in range(count)}


def take(batch: Mapping[str, Any], rows: slice) -> dict[str, Any]:
    """These sequences of a batch: every tensor whose first dimension counts them is cut, the rest is shared."""
    count = batch_rows(batch)
    return {
        k: v[rows] if isinstance(v, Tensor) and v.dim() > 0 and v.shape[0] == count else v for k, v in batch.items()
    }
