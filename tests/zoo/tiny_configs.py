"""A tiny configuration for every entry of transformers' causal-LM mapping.

Configurations are shrunk by what their attributes are called; what one model needs beside that stands in ``SPECIAL``.
"""

from __future__ import annotations

import itertools
from importlib import import_module
from typing import Any

HIDDEN, HEADS, KV, WIDTH, FFN, LAYERS, VOCAB = 48, 6, 3, 8, 40, 2, 101

_BY_VALUE: tuple[tuple[int, str], ...] = (
    (HIDDEN, ("hidden_size d_model n_embd emb_dim embedding_dim attention_hidden_size hidden_size_global "
    "embedding_size input_embedding_size output_embedding_size word_embed_proj_dim lru_width "
    "out_hidden_size hidden_dim")),
    (HEADS, ("num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
    "attention_heads num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads")),
    (KV, ("num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads num_global_key_value_heads "
    "num_query_groups")),
    (WIDTH, ("head_dim dim_head d_head d_kv kv_channels attention_head_size swa_head_dim global_head_dim "
    "attention_head_dim")),
    (FFN, ("intermediate_size n_inner ffn_dim decoder_ffn_dim encoder_ffn_dim d_ff dim_ff dff d_inner "
    "ffn_hidden_size intermediate_size_mlp dense_intermediate_size feed_forward_size mlp_dim")),
    (LAYERS, ("num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
    "num_encoder_layers num_blocks depth num_layers_per_stack")),
    (VOCAB, "vocab_size decoder_vocab_size vocab_size_per_layer_input audio_vocab_size unpadded_vocab_size"),
    (64, ("max_position_embeddings n_positions n_ctx max_seq_len model_max_length max_target_positions "
    "max_source_positions context_length original_max_position_embeddings")),
    (16, "moe_intermediate_size expert_ffn_hidden_size"),
    (24, ("shared_expert_intermediate_size shared_intermediate_size moe_shared_expert_intermediate_size "
    "shared_experts_intermediate_size")),
    (4, ("num_experts n_routed_experts num_local_experts moe_num_experts zero_expert_num sliding_window "
    "sliding_window_size window_size attention_window_size local_attention chunk_size mamba_chunk_size "
    "attention_chunk_size qk_rope_head_dim swa_qk_rope_head_dim rotary_dim index_n_heads linear_num_value_heads "
    "num_nextn_predict_layers max_window_layers mamba_n_heads mamba_num_heads n_mamba_heads "
    "linear_num_heads ssm_state_size mamba_d_state state_size conv_kernel_size block_multiple_of "
    "time_step_rank mamba_dt_rank d_rel prompt_length")),
    (2, ("num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k linear_num_key_heads mamba_expand expand "
    "n_groups mamba_n_groups mamba_ngroups index_topk index_topk_blocks index_block_size")),
    (1, ("n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group num_expert_group "
    "first_k_dense_replace num_dense_layers n_mem_blocks")),
    (0, "num_kv_shared_layers"),
    (6, "qk_nope_head_dim linear_key_head_dim index_head_dim linear_head_dim"),
    (10, "qk_head_dim hidden_size_per_layer_input linear_value_head_dim laurel_rank hc_lowrank"),
    (5, "v_head_dim"),
    (14, "kv_lora_rank o_lora_rank"),
    (18, "q_lora_rank router_hidden_size"),
    (12, "mamba_head_dim mamba_d_head mamba_headdim rel_extent"),
)  # fmt: skip
SIZES: dict[str, Any] = {name: value for value, names in _BY_VALUE for name in names.split()}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": True}
"""Attribute name -> value, wherever a configuration has the attribute as a number (or unset)."""

_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 24}
_ROPE_BY_KIND = {k: {"rope_type": "default", "rope_theta": 1e4} for k in ("full_attention", "sliding_attention")}
_KINDS = ["full_attention", "sliding_attention"]
_QWEN4 = {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
          "indexer_compress_ratio": 2, "ngram_vocab_size_base": 50, "ple_embed_dim": 48}  # fmt: skip
_DOTS3 = {"swa_q_lora_rank": 18, "swa_kv_lora_rank": 14, "swa_v_head_dim": 5, "swa_qk_nope_head_dim": 6,
          "swa_head_dim": 10, "swa_num_attention_heads": 6, "swa_num_key_value_heads": 6}  # fmt: skip
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "codegen": {"n_head": 8, "n_embd": 64},
    "cohere_compass_text": {"layer_types": _KINDS, "rope_parameters": _ROPE_BY_KIND},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 3, "clip_qkv": 8.0}},
    "diffllama": {"num_key_value_heads": 2, "num_attention_heads": 8, "head_dim": 6},
    "dots3_note": {"vision_config": {"adapter_in_dim": 48, "adapter_out_dim": 48, "adapter_merge_size": 2},
                   "audio_config": {"adapter_input_size": 48, "adapter_out_dim": 48}, "text_config": _DOTS3},
    "dots3_note_text": _DOTS3,
    # One layer before the loop, one in it, one behind. Scales of order one: its queries' would be 2,000.
    "dory": {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
             "n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1, "initializer_range": 1.0},
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 96},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": _MAMBA | {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 4},
    "mamba2": {"num_heads": 4, "head_dim": 24},
    "mellum": {"num_nextn_predict_layers": 1},
    "musicgen": {"num_codebooks": 1},
    "musicgen_melody": {"num_codebooks": 1},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_shape": (8, 8), "axial_pos_embds_dim": (16, 32), "attn_layers": ["local", "lsh"],
                 "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4},
    "roc_bert": {"pronunciation_vocab_size": 30, "shape_vocab_size": 30, "pronunciation_embed_dim": 10,
                 "shape_embed_dim": 12},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3,
              "attention_hidden_size": 96, "attention_head_dim": 16, "num_key_value_heads": 6},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3,
               "attention_hidden_size": 96, "attention_head_dim": 16, "num_key_value_heads": 6, "mamba_headdim": 24},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""Model type -> attributes, beyond :data:`SIZES`; the value ``...`` leaves the class's default."""

NOT_ALONE = {
    "gemma3n": "its vision tower comes from the package timm, which is not installed",
    "gemma4_assistant": "drafts for another model: it reads that model's keys and values, not tokens",
    "gemma4_unified_assistant": "drafts for another model: it reads that model's keys and values, not tokens",
}
"""Entries that cannot be built or run by themselves, with the reason."""

MORE_INPUTS = {"xlnet": {"token_type_ids": 1}}
"""Inputs (name -> value of each token) without which some weights are never read, beside the token ids."""

_LAYER_LISTS = ("layer_types", "layers_block_type", "mlp_layer_types")
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers")


# The causal model of these is built from the decoder's part of their configuration.
_DECODERS = {"musicgen": "MusicgenDecoderConfig", "musicgen_melody": "MusicgenMelodyDecoderConfig"}


def tiny_config(model_type: str) -> Any:
    """The configuration of this model type with a few dozen channels, six heads and as many layers as it has kinds."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    name = _DECODERS.get(model_type)
    if name is None:
        cls = CONFIG_MAPPING[model_type]
    else:
        cls = getattr(import_module(f"transformers.models.{model_type}.configuration_{model_type}"), name)
    config = cls(**_arguments(cls, SPECIAL.get(model_type, {})))
    wanted = causal_class(model_type).config_class
    # Some multimodal configurations are listed with the class of their text model.
    return config if wanted is None or isinstance(config, wanted) else config.get_text_config()


def causal_class(model_type: str) -> Any:
    """The class that the mapping names for this model type."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    if model_type in _DECODERS:
        return getattr(transformers, name)
    return MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]


def _arguments(cls: type, special: dict[str, Any]) -> dict[str, Any]:
    try:
        present = vars(cls())
    except Exception:  # some have no defaults; whatever is raised, their fields say what they take
        present = {k: None for k in cls.__dataclass_fields__}
    out: dict[str, Any] = {
        name: value
        for name, value in SIZES.items()
        if name in present and (present[name] is None or isinstance(present[name], (int, list)))
    }
    if "is_decoder" in present:
        out["is_decoder"] = True
    if "kv_lora_rank" in present:
        # Multi-head latent attention: every head has its key and value, and rotates a part of its own.
        out["num_key_value_heads"] = HEADS
        out.pop("head_dim", None)
    kinds = {k: list(dict.fromkeys(present[k])) for k in _LAYER_LISTS if isinstance(present.get(k), (list, tuple))}
    if kinds:
        count = max(LAYERS, *map(len, kinds.values()))
        out |= {k: list(itertools.islice(itertools.cycle(v), count)) for k, v in kinds.items()}
        out |= {k: count for k in _COUNTS if k in present}
    for name, sub in (getattr(cls, "sub_configs", None) or {}).items():
        own = special.get(name, {})
        if own is ...:
            continue
        default = present.get(name)
        sub = type(default) if hasattr(default, "__dataclass_fields__") else sub
        if hasattr(sub, "__dataclass_fields__"):
            arguments = _arguments(sub, own)
            if getattr(sub, "model_type", "") and getattr(cls.sub_configs[name], "__name__", "") == "AutoConfig":
                arguments["model_type"] = sub.model_type
            out[name] = arguments
    for name, value in special.items():
        if value is ...:
            out.pop(name, None)
        elif name not in out or not isinstance(out[name], dict):
            out[name] = value
    return out
