"""GPT-NeoX: heads are ``hidden_size // num_attention_heads`` wide in the stock constructor.

``head_dim`` in the configuration makes the width of a head independent of their number.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from pyprune.families import Family, register
from pyprune.families.linear import dividing_heads, linear


def _resize(module: nn.Module, config: Any) -> None:
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention

    if isinstance(module, GPTNeoXAttention):
        inner = config.num_attention_heads * config.head_dim
        module.query_key_value = linear(module.query_key_value, outputs=3 * inner)
        module.dense = linear(module.dense, inputs=inner)


register(
    Family(
        name="gpt_neox",
        model_types=("gpt_neox",),
        explicit={"head_dim": lambda config: config.hidden_size / config.num_attention_heads},
        stock=dividing_heads,
        resize=_resize,
    )
)
