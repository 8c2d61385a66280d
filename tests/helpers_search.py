"""A small search: a tiny Llama, its groups and Wanda scores, token ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from helpers_llama import tiny_llama
from torch import Tensor, nn

from pyprune import discover, score
from pyprune.discovery.groups import Groups
from pyprune.importance.scores import Scores
from pyprune.search import search_plan
from pyprune.selection.plan import Plan


def ids(samples: int = 16, length: int = 16, seed: int = 0, vocabulary: int = 97) -> Tensor:
    return torch.randint(0, vocabulary, (samples, length), generator=torch.Generator().manual_seed(seed))


@dataclass
class Case:
    """A model with all that a search over it needs."""

    model: nn.Module
    groups: Groups
    scores: Scores

    def search(self, ratio: float | None = 0.2, batches: Any = None, **options: Any) -> Plan:
        given = ids() if batches is None else batches
        return search_plan(self.model, self.groups, self.scores, given, ratio, **{"steps": 3, **options})


def make(model: nn.Module | None = None, roles: tuple[str, ...] = ("kv_heads", "ffn"), vocabulary: int = 97) -> Case:
    model = tiny_llama() if model is None else model
    groups = discover(model)
    return Case(model, groups, score(model, groups, ids(8, vocabulary=vocabulary), "wanda", roles=list(roles)))


def divergence(dense: nn.Module, cut: nn.Module, tokens: Tensor) -> float:
    """Kullback-Leibler divergence over the whole vocabulary, nats a token."""
    with torch.no_grad():
        p, q = (m(tokens).logits.log_softmax(-1) for m in (dense, cut))
    return float((p.exp() * (p - q)).sum(-1).mean())
