"""Llama: its configuration class refuses head counts that do not divide ``hidden_size``, though the model allows them.

Mistral without a sliding window is the same network, operation for operation, and has no such rule: a pruned Llama
with, say, 28 of 32 heads is saved as one, and every program that reads Mistral opens it.
"""

from __future__ import annotations

from typing import Any

from pyprune.families import Family, register

_SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache",
    "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "rope_parameters", "attention_dropout",
    "dtype",
)  # fmt: skip


def _stand_in(config: Any) -> tuple[type, Any] | None:
    from transformers import MistralConfig, MistralForCausalLM

    if config.attention_bias or config.mlp_bias or config.is_heterogeneous:
        return None
    values = {name: getattr(config, name) for name in _SHARED}
    return MistralForCausalLM, MistralConfig(**values, sliding_window=None)


register(Family(name="llama", model_types=("llama",), stand_in=_stand_in))
