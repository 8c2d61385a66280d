"""Symmetric matrices at half their size."""

from __future__ import annotations

import torch
from torch import Tensor


def upper(gram: Tensor) -> Tensor:
    """The upper triangle of a symmetric matrix [n, n], row after row: [n (n + 1) / 2]."""
    return torch.cat([row[i:] for i, row in enumerate(gram)])


def mirrored(upper: Tensor, n: int) -> Tensor:
    """The matrix [n, n] of an upper triangle, element for element."""
    out = upper.new_empty(n, n)
    start = 0
    for i in range(n):
        row = upper[start : start + n - i]
        out[i, i:] = row
        out[i:, i] = row
        start += n - i
    return out
