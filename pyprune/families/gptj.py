"""GPT-J: heads are ``n_embd // n_head`` wide in the stock constructor.

``head_dim`` in the configuration makes the width of a head independent of their number.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from pyprune.families import Family, register
from pyprune.families.linear import dividing_heads, linear


def _resize(module: nn.Module, config: Any) -> None:
    from transformers.models.gptj.modeling_gptj import GPTJAttention

    if isinstance(module, GPTJAttention):
        inner = config.num_attention_heads * config.head_dim
        module.num_attention_heads = config.num_attention_heads
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(module, name, linear(getattr(module, name), outputs=inner))
        module.out_proj = linear(module.out_proj, inputs=inner)


register(
    Family(
        name="gptj",
        model_types=("gptj",),
        explicit={"head_dim": lambda config: config.hidden_size / config.num_attention_heads},
        stock=dividing_heads,
        resize=_resize,
    )
)
