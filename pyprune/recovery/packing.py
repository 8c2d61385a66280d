"""Examples as rows of equal length. Documents that share a row do not see each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyprune.importance.losses import IGNORED
from pyprune.importance.modes import evaluating
from pyprune.recovery.examples import Example

OPEN_ROWS = 64  # rows that a document may still go into


@dataclass(frozen=True, eq=False)
class Row:
    """One training sequence.

    Attributes:
        ids: int64 [tokens].
        labels: int64 [tokens]: the token itself where it is learned, else -100.
        positions: int64 [tokens]: from 0 in every document, which is how models with packed rows tell them apart.
    """

    ids: np.ndarray
    labels: np.ndarray
    positions: np.ndarray

    @property
    def learned(self) -> int:
        """Tokens that carry loss."""
        return int((self.labels != IGNORED).sum())


def pieces(example: Example, cutoff: int) -> list[Example]:
    """Parts of at most ``cutoff`` tokens with something to learn: all of a plain text, the beginning of an answer."""
    stop = min(len(example.ids), cutoff) if example.whole else len(example.ids)
    out = []
    for at in range(0, stop, cutoff):
        span = slice(at, min(at + cutoff, stop))
        learned = example.learned[span].copy()
        learned[:1] = False
        if learned.any():
            out.append(Example(example.ids[span], learned, example.whole))
    return out


def rows_of(examples: Sequence[Example], cutoff: int, packing: bool) -> list[Row]:
    """Rows of at most ``cutoff`` tokens from pieces no longer than that, in order.

    With ``packing`` each goes into the open row that it fills best (the last 64 rows are open), else into a new one.
    """
    bins: list[list[Example]] = []
    room: list[int] = []
    for example in examples:
        need = len(example.ids)
        first = max(0, len(bins) - OPEN_ROWS)
        fitting = [i for i in range(first, len(bins)) if room[i] >= need] if packing else []
        if fitting:
            best = min(fitting, key=lambda i: room[i])
            bins[best].append(example)
            room[best] -= need
        else:
            bins.append([example])
            room.append(cutoff - need)
    return [_row(parts) for parts in bins]


def _row(parts: Sequence[Example]) -> Row:
    ids = np.concatenate([p.ids for p in parts])
    learned = np.concatenate([p.learned for p in parts])
    positions = np.concatenate([np.arange(len(p.ids), dtype=np.int64) for p in parts])
    return Row(ids, np.where(learned, ids, IGNORED), positions)


def collate(rows: Iterable[Row], positions: bool, device: Any = "cpu") -> dict[str, Tensor]:
    """A batch: ``input_ids``, ``labels`` and, where asked, ``position_ids``, all int64 [rows, longest].

    Padding follows the row as a document of its own, so that no attention mask is needed: nothing before it sees it.
    """
    rows = list(rows)
    longest = max(len(r.ids) for r in rows)
    ids, labels, places = [], [], []
    for row in rows:
        fill = longest - len(row.ids)
        ids.append(np.pad(row.ids, (0, fill)))
        labels.append(np.pad(row.labels, (0, fill), constant_values=IGNORED))
        places.append(np.concatenate([row.positions, np.arange(fill, dtype=np.int64)]))
    out = {"input_ids": torch.from_numpy(np.stack(ids)), "labels": torch.from_numpy(np.stack(labels))}
    if positions:
        out["position_ids"] = torch.from_numpy(np.stack(places))
    return {k: v.to(device) for k, v in out.items()}


@torch.no_grad()
def isolates(model: nn.Module) -> bool:
    """Whether ``model`` keeps documents in one row apart when their positions start anew: tried, not looked up.

    Other tokens in the first document must leave every bit of the second one's logits as it was, and the second must
    get the logits that it gets alone.
    """
    weight = next(model.parameters())
    vocabulary = int(model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
    ids = torch.arange(3, 19, device=weight.device)[None] % vocabulary
    other = torch.cat([(ids[:, :7] + 1) % vocabulary, ids[:, 7:]], dim=1)
    places = torch.cat([torch.arange(7), torch.arange(9)])[None].to(weight.device)
    try:
        with evaluating(model):
            first, second = (_logits(model, row, places)[:, 7:] for row in (ids, other))
            alone = _logits(model, ids[:, 7:], None)
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False
    tolerance = 1e-4 if first.dtype == torch.float32 else 5e-2
    same = torch.allclose(first, alone, rtol=tolerance, atol=tolerance * float(alone.abs().max()))
    return same and torch.equal(first, second)


def _logits(model: nn.Module, ids: Tensor, places: Tensor | None) -> Tensor:
    more = {} if places is None else {"position_ids": places}
    return model(input_ids=ids, use_cache=False, **more).logits
