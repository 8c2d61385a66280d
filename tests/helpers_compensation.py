"""Calibration, plans and distances for the tests of compensation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyprune import discover, score, select
from pyprune.selection.plan import Plan


def ids(samples: int = 40, length: int = 16, seed: int = 0, vocabulary: int = 97) -> Tensor:
    return torch.randint(0, vocabulary, (samples, length), generator=torch.Generator().manual_seed(seed))


def planned(model: nn.Module, criterion: str = "wanda", **widths: int) -> Plan:
    groups = discover(model)
    scores = score(model, groups, ids(8), criterion, roles=list(widths))
    return select(groups, scores, widths=widths)


def off(model: nn.Module, dense: nn.Module) -> float:
    """Squared distance of the logits on other tokens, as a fraction."""
    with torch.no_grad():
        a, b = (m(ids(8, seed=1)).logits for m in (model, dense))
    return float((a - b).square().sum() / b.square().sum())
