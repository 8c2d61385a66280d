"""BLOOM: heads as wide as ``hidden_size // n_head``, FFN four times the hidden size, ALiBi slopes by head count.

``head_dim`` and ``intermediate_size`` in the configuration make those widths independent; ``alibi_heads`` is the number
of heads that slopes are computed for, of which each layer keeps its own.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from pyprune.families import Family, register
from pyprune.families.alibi import alibi_heads, stock, take_rows
from pyprune.families.linear import linear


def _resize(module: nn.Module, config: Any) -> None:
    from transformers.models.bloom.modeling_bloom import BloomAttention, BloomMLP

    if isinstance(module, BloomAttention) and config.num_attention_heads != alibi_heads(config):
        heads = config.num_attention_heads
        module.num_heads = heads
        module.split_size = inner = heads * config.head_dim
        module.query_key_value = linear(module.query_key_value, outputs=3 * inner)
        module.dense = linear(module.dense, inputs=inner)
        take_rows(module, "alibi", 2, heads, batched=True)
    width = getattr(config, "intermediate_size", None)
    if isinstance(module, BloomMLP) and width is not None:
        module.dense_h_to_4h = linear(module.dense_h_to_4h, outputs=width)
        module.dense_4h_to_h = linear(module.dense_4h_to_h, inputs=width)


register(
    Family(
        name="bloom",
        model_types=("bloom",),
        explicit={
            "head_dim": lambda config: config.hidden_size / config.num_attention_heads,
            "alibi_heads": lambda config: config.num_attention_heads,
            "intermediate_size": lambda config: 4 * config.hidden_size,
        },
        stock=stock,
        resize=_resize,
        tables=("kv_heads",),
    )
)
