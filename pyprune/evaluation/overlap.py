"""Whether a model is measured on the text that it was pruned with: such a perplexity says little."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

SHINGLE = 16  # tokens
SHARE = 0.05  # of the shingles of either text, from which on they count as one corpus


def overlap_notes(calibration: Any, batches: Iterable[Mapping[str, Any]] | None, evaluation: Any,
                  windows: Tensor | None) -> list[str]:  # fmt: skip
    """A sentence where calibration and evaluation come from one corpus, else nothing.

    Args:
        calibration: its source, as it was given.
        batches: what was read of it, or None.
        evaluation: source of the evaluation text.
        windows: what was read of it, int64 [windows, length], or None.
    """
    if evaluation is None or calibration is None:
        return []
    way = "Measure on text that pruning has not seen."
    same = same_source(calibration, evaluation)
    if same is not None:
        return [f"The text that perplexity is measured on is the calibration text ({same}): the figure flatters. {way}"]
    if batches is None or windows is None:
        return []
    share = shared_shingles([b["input_ids"] for b in batches if "input_ids" in b], windows)
    if share < SHARE:
        return []
    shared = f"Calibration and evaluation text share {share:.0%} of their passages of {SHINGLE} tokens"
    return [f"{shared}: the figure flatters. {way}"]


def same_source(one: Any, other: Any) -> str | None:
    """How two sources are the same (one file, files of the same bytes, one dataset and split), or None."""
    if not isinstance(one, (str, os.PathLike)) or not isinstance(other, (str, os.PathLike)):
        return "the same object" if one is other else None
    a, b = (os.path.expanduser(os.fspath(v)) for v in (one, other))
    if os.path.isfile(a) and os.path.isfile(b):
        try:
            if os.path.samefile(a, b):
                return "the same file"
            return "files of the same content" if filecmp.cmp(a, b, shallow=False) else None
        except OSError:
            return None
    return "the same dataset and split" if a == b and not os.path.exists(a) else None


def shared_shingles(one: Iterable[Tensor], other: Tensor) -> float:
    """The larger share of distinct 16-token passages of one text that the other has too, 0 to 1.

    Args:
        one: token ids [rows, length] each.
        other: token ids [rows, length].
    """
    a = np.unique(np.concatenate([np.zeros(0, np.int64), *(_shingles(ids) for ids in one)]))
    b = np.unique(_shingles(other))
    if not len(a) or not len(b):
        return 0.0
    return float(np.isin(a, b).sum() / min(len(a), len(b)))


def _shingles(ids: Tensor) -> np.ndarray:
    """A 64-bit number for every 16 tokens in a row; passages of one repeated token (padding, say) are left out."""
    if ids.dim() != 2 or ids.shape[1] < SHINGLE:
        return np.zeros(0, np.int64)
    passages = ids.detach().cpu().to(torch.int64).unfold(1, SHINGLE, 1).reshape(-1, SHINGLE)
    passages = passages[(passages != passages[:, :1]).any(1)]
    generator = torch.Generator().manual_seed(16)
    factors = torch.randint(-(2**62), 2**62, (SHINGLE,), generator=generator) * 2 + 1
    return (passages * factors).sum(1).numpy()  # wraps around, as a hash may
