"""What the adapters share: linear layers of another size, head counts that stock constructors take."""

from __future__ import annotations

from typing import Any

from torch import nn


def linear(like: nn.Module, inputs: int | None = None, outputs: int | None = None) -> Any:
    """A linear layer of ``like``'s class, with or without a bias as there, and these sizes; None keeps one."""
    assert isinstance(like, nn.Linear)
    return type(like)(inputs or like.in_features, outputs or like.out_features, bias=like.bias is not None)


def dividing_heads(config: Any) -> None:
    """As many heads as make the hidden size, for constructors that divide it among them. In place."""
    config.num_attention_heads = config.hidden_size // config.head_dim
