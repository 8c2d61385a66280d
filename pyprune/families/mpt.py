"""MPT: heads as wide as ``d_model // n_heads``, FFN four times ``d_model``, ALiBi slopes by head count.

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
    from transformers.models.mpt.modeling_mpt import MptAttention, MptMLP

    if isinstance(module, MptAttention) and config.num_attention_heads != alibi_heads(config):
        heads = config.num_attention_heads
        module.n_heads = heads
        module.Wqkv = linear(module.Wqkv, outputs=3 * heads * config.head_dim)
        module.out_proj = linear(module.out_proj, inputs=heads * config.head_dim)
        take_rows(module, "position_bias", 1, heads, batched=False)
    width = getattr(config, "intermediate_size", None)
    if isinstance(module, MptMLP) and width is not None:
        module.up_proj = linear(module.up_proj, outputs=width)
        module.down_proj = linear(module.down_proj, inputs=width)


register(
    Family(
        name="mpt",
        model_types=("mpt",),
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
