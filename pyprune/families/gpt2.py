"""GPT-2: heads are ``n_embd // n_head`` wide in the stock constructor, so fewer heads would mean wider ones.

``head_dim`` in the configuration makes the width of a head independent of their number.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from pyprune.families import Family, register


def _stock(config: Any) -> None:
    config.num_attention_heads = 1


def _resize(module: nn.Module, config: Any) -> None:
    from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
    from transformers.pytorch_utils import Conv1D as Conv1DClass

    Conv1D: Any = Conv1DClass
    if not isinstance(module, GPT2Attention):
        return
    heads, width = config.num_attention_heads, config.head_dim
    inner, hidden = heads * width, config.hidden_size
    module.num_heads, module.head_dim, module.split_size = heads, width, inner
    module.scaling = 1.0
    if module.scale_attn_weights:
        module.scaling = width**-0.5
    if module.scale_attn_by_inverse_layer_idx:
        module.scaling /= float(module.layer_idx + 1)
    if module.is_cross_attention:
        module.c_attn = Conv1D(2 * inner, hidden)
        module.q_attn = Conv1D(inner, hidden)
    else:
        module.c_attn = Conv1D(3 * inner, hidden)
    module.c_proj = Conv1D(hidden, inner)


register(
    Family(
        name="gpt2",
        model_types=("gpt2",),
        explicit={"head_dim": lambda config: config.hidden_size / config.num_attention_heads},
        stock=_stock,
        resize=_resize,
    )
)
