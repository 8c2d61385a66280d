"""The training text: several sources in proportion, a part held out for validation, a fixed order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pyprune.errors import PyPruneError
from pyprune.progress import bar
from pyprune.recovery.examples import Encoder, Example
from pyprune.recovery.packing import Row, pieces, rows_of
from pyprune.recovery.records import name_of, read_records

HELD_OUT = 0.1  # of a source at most
WHOLE_TEXT = 10  # a source of fewer documents is held out by pieces of them

Sources = Sequence[tuple[Any, float | None]]


@dataclass(frozen=True)
class Reading:
    """How sources become rows. ``packing`` is off for models that would see other documents of their row."""

    cutoff: int
    packing: bool
    seed: int
    max_tokens: int | None = None


@dataclass
class Text:
    """What is trained and validated on.

    Attributes:
        sources: rows of each source, in random order.
        weights: share of the tokens of each source; None takes all that there is.
        validation: rows that are never trained on.
        facts: per source: name, documents, tokens, rows, documents without anything to learn. JSON-serialisable.
    """

    sources: list[list[Row]]
    weights: list[float] | None
    validation: list[Row]
    facts: list[dict[str, Any]] = field(default_factory=list)

    def order(self, epochs: float, seed: int) -> list[Row]:
        """Rows in the order in which they are trained on.

        Within an epoch every row of every source comes once, shuffled; with weights, as many rows of each source as its
        share allows until the first source is used up. The next epoch goes on where the others stopped.
        """
        rng = np.random.default_rng(seed)
        counts = [len(rows) for rows in self.sources]
        if self.weights is not None:
            mean = [np.mean([len(r.ids) for r in rows]) for rows in self.sources]
            shares = [w / m for w, m in zip(self.weights, mean, strict=True)]  # weights are of tokens
            scale = min(n / s for n, s in zip(counts, shares, strict=True))
            counts = [max(1, round(s * scale)) for s in shares]
        taken = [0] * len(counts)
        out: list[Row] = []
        total = max(1, round(sum(counts) * epochs))
        while len(out) < total:
            epoch = []
            for i, (rows, count) in enumerate(zip(self.sources, counts, strict=True)):
                epoch += [rows[(taken[i] + j) % len(rows)] for j in range(min(count, len(rows)))]
                taken[i] += count
            out += [epoch[i] for i in rng.permutation(len(epoch))]
        return out[:total]

    def fingerprint(self) -> str:
        """Changes with any token, label or weight."""
        digest = hashlib.sha256(repr(self.weights).encode())
        for rows in (*self.sources, self.validation):
            for row in rows:
                for part in (row.ids, row.labels, row.positions):
                    digest.update(part.tobytes())
        return digest.hexdigest()[:16]


def read_text(
    sources: Sources, validation: Sources | None, encoder: Encoder, reading: Reading, val_tokens: int
) -> Text:
    """Reads, tokenises, splits off validation and packs.

    Args:
        sources: (source, weight or None) each.
        validation: sources to validate on, each with a weight or none; None holds out a part of ``sources``, by whole
            documents.
        val_tokens: the most tokens to validate on, at most a tenth of each source when they are held out.

    Raises:
        PyPruneError: a source cannot be read, or holds too little to train and validate on.
    """
    rng = np.random.default_rng(reading.seed)
    weights = [float(w) for _, w in sources if w is not None] or None
    shares = _shares(sources)
    rows, held, facts = [], [], []
    for (source, _), share in zip(sources, shares, strict=True):
        groups, fact = _documents(source, encoder, reading)
        groups = [groups[i] for i in rng.permutation(len(groups))]
        aside = 0 if validation is not None else _held_out(groups, share * val_tokens)
        if aside == len(groups) or (aside == 0 and validation is None):
            problem = "has too little text to train on and to hold a part out"
            raise PyPruneError(encoder.option, name_of(source), problem, "Give more of it, or give val_data.")
        held += [p for g in groups[:aside] for p in g]
        packed = rows_of([p for g in groups[aside:] for p in g], reading.cutoff, reading.packing)
        rows.append([packed[i] for i in rng.permutation(len(packed))])
        facts.append({**fact, "rows": len(packed), "held_out": aside})
    if validation is not None:
        other = Encoder(
            encoder.tokenizer, encoder.field, "chat" if encoder.chat else "alpaca", encoder.prompts, "val_data"
        )
        read = [_documents(source, other, reading)[0] for source, _ in validation]
        shares, most = _shares(validation), float(val_tokens)
        if validation[0][1] is not None:  # proportions hold until the first source is used up, as in training
            most = min(most, *(_tokens(groups) / share for groups, share in zip(read, shares, strict=True)))
        for groups, share in zip(read, shares, strict=True):
            count = _count(groups, share * most + 1e-6)  # rounding must not cost a source its last document
            held += [p for g in groups[: max(1, count)] for p in g]
    kept_back = rows_of(held, reading.cutoff, reading.packing)
    return Text(rows, weights, [kept_back[i] for i in rng.permutation(len(kept_back))], facts)


def _shares(sources: Sources) -> list[float]:
    """The share of the tokens of each source: by its weight, or alike."""
    weights = [1.0 if w is None else w for _, w in sources]
    return [w / sum(weights) for w in weights]


def _tokens(groups: Sequence[list[Example]]) -> int:
    return sum(len(p.ids) for g in groups for p in g)


def _documents(source: Any, encoder: Encoder, reading: Reading) -> tuple[list[list[Example]], dict[str, Any]]:
    """Pieces by document, and what was read."""
    out: list[list[Example]] = []
    tokens = barren = documents = 0
    name = name_of(source)
    with bar(f"read {name}") as line:
        for record, where in read_records(source, reading.seed, encoder.option):
            example = encoder(record, where)
            parts = pieces(example, reading.cutoff)
            documents += 1
            if not parts:
                barren += 1
                continue
            sizes = np.cumsum([len(p.ids) for p in parts])
            if reading.max_tokens is not None:  # of a long text only as much as is wanted
                parts = parts[: 1 + int(np.searchsorted(sizes, reading.max_tokens - tokens))]
            tokens += int(sizes[len(parts) - 1])
            out.append(parts)
            line.advance()
            if reading.max_tokens is not None and tokens >= reading.max_tokens:
                break
    if not out:
        problem = f"has nothing to learn in its {documents} records, at {reading.cutoff} tokens each"
        raise PyPruneError(encoder.option, name, problem, "Raise cutoff, or give answers that are not empty.")
    if len(out) < WHOLE_TEXT:
        out = [[part] for parts in out for part in parts]
    fact = {"source": name, "documents": documents, "tokens": tokens, "nothing_to_learn": barren}
    return out, fact


def _held_out(groups: Sequence[list[Example]], tokens: float) -> int:
    """How many documents from the front make up so many tokens, at most a tenth of all tokens, at least one."""
    return min(len(groups), max(1, _count(groups, min(tokens, HELD_OUT * _tokens(groups)))))


def _count(groups: Sequence[list[Example]], tokens: float) -> int:
    """The most documents from the front that hold no more than so many tokens."""
    sizes = np.cumsum([sum(len(p.ids) for p in g) for g in groups])
    return int(np.searchsorted(sizes, tokens, side="right"))
