"""A tiny model of every family that the project names, remote code included."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from helpers_discovery import liven

FIXTURES = Path(__file__).parent / "fixtures"
TOKENS = {"vocab_size": 101, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
PLAIN = {**TOKENS, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6,
         "max_position_embeddings": 64}  # fmt: skip
GROUPED = {**PLAIN, "num_key_value_heads": 3, "head_dim": 8}
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
LATENT = {**PLAIN, "num_key_value_heads": 6, **EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1,
          "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 18, "kv_lora_rank": 14, "qk_rope_head_dim": 4,
          "qk_nope_head_dim": 6, "v_head_dim": 5}  # fmt: skip
GPT2 = {**TOKENS, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 64}
HYBRID = {**GROUPED, "mamba_n_heads": 4, "mamba_d_head": 24, "mamba_d_state": 4, "mamba_n_groups": 2,
          "attn_layer_indices": [1]}  # fmt: skip
FALCON = {k: v for k, v in PLAIN.items() if k != "intermediate_size"} | {"ffn_hidden_size": 40}
LLAMA31 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 16}  # fmt: skip


@dataclass(frozen=True)
class Named:
    """A family, and what pruning half of its heads and FFN channels must come to.

    Attributes:
        config: class of transformers, or a folder under ``tests/fixtures``.
        heads: the role of the heads that are cut; None in a family without.
        ffn: roles of the channels that are cut.
        stock: plain transformers opens the result.
        note: what the user is told, in part: "resized", "narrow", or None for nothing.
    """

    config: str
    sizes: dict[str, Any]
    heads: str | None = "kv_heads"
    ffn: tuple[str, ...] = ("ffn",)
    stock: bool = True
    note: str | None = None

    @property
    def remote(self) -> bool:
        return self.config.startswith("baichuan")


def _own(config: str, sizes: dict[str, Any], note: str | None = None, **more: Any) -> Named:
    """Opened by pyprune alone."""
    return Named(config, sizes, stock=False, note=note, **more)


NAMED: dict[str, Named] = {
    "LLaMA": Named("LlamaConfig", {**GROUPED, "num_key_value_heads": 6}),
    "Llama-2": Named("LlamaConfig", {**GROUPED, "rms_norm_eps": 1e-5}),
    "Llama-3": Named("LlamaConfig", {**GROUPED, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "Llama-3.1": Named("LlamaConfig", {**GROUPED, "rope_parameters": LLAMA31}),
    "Vicuna": Named("LlamaConfig", {**PLAIN, "num_key_value_heads": 6, "pad_token_id": None}),
    "TinyLlama": Named("LlamaConfig", {**PLAIN, "num_key_value_heads": 2}),
    "BLOOM": _own("BloomConfig", {**TOKENS, "hidden_size": 48, "n_layer": 2, "n_head": 6}),
    "Baichuan 7B": _own("baichuan_7b", PLAIN, "resized"),
    "Baichuan 13B": _own("baichuan_13b", PLAIN, "narrow"),
    "Qwen2": Named("Qwen2Config", {**PLAIN, "num_key_value_heads": 3}),
    "Qwen3": Named("Qwen3Config", {**GROUPED, "head_dim": 10}),
    "Qwen3-MoE": Named("Qwen3MoeConfig", {**GROUPED, **EXPERTS, "num_experts": 4}, ffn=("expert_ffn",)),
    "Mistral": Named("MistralConfig", {**GROUPED, "sliding_window": 4}),
    "Mixtral": Named("MixtralConfig", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
                     ffn=("expert_ffn",)),
    "Gemma 2": Named("Gemma2Config", {**GROUPED, "query_pre_attn_scalar": 8, "sliding_window": 4}),
    "Gemma 3": Named("Gemma3TextConfig", {**GROUPED, "query_pre_attn_scalar": 8, "sliding_window": 4}),
    "Phi-3": Named("Phi3Config", {**PLAIN, "num_key_value_heads": 3}),
    "GPT-2": _own("GPT2Config", GPT2),
    "GPT-NeoX": _own("GPTNeoXConfig", PLAIN),
    "GPT-J": _own("GPTJConfig", {**GPT2, "rotary_dim": 4}),
    "OPT": _own("OPTConfig", {**{k: v for k, v in PLAIN.items() if k != "intermediate_size"}, "ffn_dim": 40,
                              "word_embed_proj_dim": 48}),
    "Falcon, multi-query": _own("FalconConfig", FALCON, "resized", heads="query_heads"),
    "Falcon, grouped": _own("FalconConfig", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 3}, "resized"),
    "Falcon, ALiBi": _own("FalconConfig", {**FALCON, "alibi": True, "multi_query": False}, "narrow"),
    "StableLM": _own("StableLmConfig", {**PLAIN, "num_key_value_heads": 3}, "resized"),
    "Cohere": Named("CohereConfig", {**PLAIN, "num_key_value_heads": 3}),
    "OLMo-2": Named("Olmo2Config", {**PLAIN, "num_key_value_heads": 3}),
    "Granite": Named("GraniteConfig", {**PLAIN, "num_key_value_heads": 3}),
    "DeepSeek-V2": Named("DeepseekV2Config", LATENT, ffn=("ffn", "expert_ffn")),
    "DeepSeek-V3": Named("DeepseekV3Config", LATENT, ffn=("ffn", "expert_ffn")),
    "gpt-oss": Named("GptOssConfig", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4,
                                      "layer_types": ["sliding_attention", "full_attention"]}, ffn=("expert_ffn",)),
    "Mamba": Named("MambaConfig", {**TOKENS, "hidden_size": 48, "num_hidden_layers": 2, "state_size": 4,
                                   "time_step_rank": 4}, heads=None, ffn=("channels",)),
    "Bamba (hybrid)": Named("BambaConfig", HYBRID),
    "MPT": _own("MptConfig", {**TOKENS, "d_model": 48, "n_heads": 6, "n_layers": 2, "max_seq_len": 64}),
    "GPT-Neo": _own("GPTNeoConfig", {**TOKENS, "hidden_size": 48, "intermediate_size": 40, "num_layers": 2,
                                     "num_heads": 6, "max_position_embeddings": 64, "window_size": 4,
                                     "attention_types": [[["global", "local"], 1]]}, "resized"),
    "XGLM": _own("XGLMConfig", {**TOKENS, "d_model": 48, "ffn_dim": 40, "num_layers": 2, "attention_heads": 6,
                                "max_position_embeddings": 64}, "resized"),
}  # fmt: skip
"""Display name -> family."""


def build(name: str, folder: Path) -> Any:
    """The tiny model, float32, in evaluation mode, its signals of order one.

    Args:
        folder: an empty one that a family with remote code has its checkpoint in afterwards.
    """
    import transformers as t

    t.utils.logging.set_verbosity_error()
    family = NAMED[name]
    torch.manual_seed(0)
    if not family.remote:
        config = getattr(t, family.config)(**family.sizes)
        return liven(t.AutoModelForCausalLM.from_config(config).eval())
    write_remote(family, folder)
    return t.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


def write_remote(family: Named, folder: Path) -> None:
    """A checkpoint that brings its own modelling code, with random weights."""
    import transformers as t

    shutil.copytree(FIXTURES / family.config, folder, dirs_exist_ok=True)
    sizes = family.sizes if family.config.endswith("7b") else {**family.sizes, "model_max_length": 64}
    config = {
        "model_type": "baichuan",
        "architectures": ["BaichuanForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_baichuan.BaichuanConfig",
            "AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps({**config, **sizes}))
    made = t.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    liven(t.AutoModelForCausalLM.from_config(made, trust_remote_code=True)).save_pretrained(folder)
