"""Attention modules that are handed the ALiBi table of all the model's heads and have fewer of them.

ALiBi (Press, Smith and Lewis, "Train Short, Test Long", 2022) adds to each head's scores a slope times the distance,
and the slopes are a function of the number of heads: computed for fewer heads they would all be others. So the model
goes on computing the table for as many heads as it once had (``alibi_heads`` in the configuration), and each attention
module takes the rows of the heads that it still has.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from pyprune.families import KEPT


def alibi_heads(config: Any) -> int:
    """Heads that slopes are computed for."""
    return getattr(config, "alibi_heads", None) or config.num_attention_heads


def stock(config: Any) -> None:
    """The stock constructor computes slopes for all the heads that there were. In place."""
    config.num_attention_heads = alibi_heads(config)


def take_rows(attention: nn.Module, argument: str, position: int, heads: int, batched: bool) -> None:
    """Makes ``attention`` take its own rows of the table that its ``forward`` is given. In place.

    The module gets a buffer :data:`pyprune.families.KEPT`, int64 [heads]: the rows of the heads that it has, and its
    class says in ``table_rows`` which table it reads: (argument, position, batched).

    Args:
        argument: name of the table in ``forward``: [rows, ...], or with ``batched`` [batch * rows, ...].
        position: of the argument, counted from 0 (``hidden_states``).
        heads: how many rows it takes.
    """
    own: Any = type(attention)
    attention.__class__ = _reader(own, argument, position, batched)
    attention.register_buffer(KEPT, torch.empty(heads, dtype=torch.int64))


@cache
def _reader(cls: Any, argument: str, position: int, batched: bool) -> Any:
    def forward(self: Any, hidden_states: Tensor, *arguments: Any, **named: Any) -> Any:
        kept = getattr(self, KEPT)
        values = list(arguments)
        place: Any = (named, argument) if argument in named else (values, position - 1)
        table = place[0][place[1]]
        if batched:
            rows = table.unflatten(0, (hidden_states.shape[0], -1)).index_select(1, kept).flatten(0, 1)
        else:
            rows = table.index_select(0, kept)
        place[0][place[1]] = rows
        return cls.forward(self, hidden_states, *values, **named)

    body = {"forward": forward, "table_rows": (argument, position, batched), "__module__": cls.__module__}
    return type(cls.__name__, (cls,), body)
