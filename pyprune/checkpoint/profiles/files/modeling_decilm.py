"""The Llama of transformers with as many KV heads and FFN channels in each layer as ``block_configs`` says."""

from __future__ import annotations

import copy
from typing import Any

from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from .configuration_decilm import DeciLMConfig


class DeciLMForCausalLM(LlamaForCausalLM):
    """Opened with ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``."""

    config_class = DeciLMConfig

    def __init__(self, config: DeciLMConfig) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.model.layers):
            own: Any = copy.copy(config)
            own.num_key_value_heads = config.kv_heads(index)
            own.intermediate_size = config.ffn_channels(index)
            layer.mlp = LlamaMLP(own)
            layer.self_attn = type(layer.self_attn)(own, index)
            layer.self_attn.config = config
