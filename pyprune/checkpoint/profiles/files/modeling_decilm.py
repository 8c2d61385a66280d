"""The Llama of transformers with as many KV heads and FFN channels in each layer as ``block_configs`` says.

What a layer is without (``no_op``) adds zeros to the residual stream, and the norm in front of it is gone, too.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from .configuration_decilm import DeciLMConfig


class NoAttention(nn.Module):
    def forward(self, hidden_states: Tensor, **others: Any) -> tuple[Tensor, None]:
        return torch.zeros_like(hidden_states), None


class NoFFN(nn.Module):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.zeros_like(hidden_states)


class DeciLMForCausalLM(LlamaForCausalLM):
    """Opened with ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``."""

    config_class = DeciLMConfig

    def __init__(self, config: DeciLMConfig) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.model.layers):
            own: Any = copy.copy(config)
            block = config.block_configs[index]
            if block.attention.no_op:
                layer.self_attn, layer.input_layernorm = NoAttention(), nn.Identity()
            else:
                own.num_key_value_heads = config.kv_heads(index)
                layer.self_attn = type(layer.self_attn)(own, index)
                layer.self_attn.config = config
            if block.ffn.no_op:
                layer.mlp, layer.post_attention_layernorm = NoFFN(), nn.Identity()
            else:
                own.intermediate_size = config.ffn_channels(index)
                layer.mlp = LlamaMLP(own)
