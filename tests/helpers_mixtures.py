"""Tiny mixtures of experts, latent attention and state-space models with signals of order one."""

from __future__ import annotations

import dataclasses
import inspect

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pyprune.caching import cache_argument, cache_of

BASE = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=6, vocab_size=101, bos_token_id=1, eos_token_id=2,
            pad_token_id=0, max_position_embeddings=64)  # fmt: skip
GROUPED = {**BASE, "num_key_value_heads": 3}
LATENT = dict(kv_lora_rank=20, q_lora_rank=22, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=14)


def config_of(family: str, **changes):
    """The tiny configuration of a family; every size differs from the others where the class lets it."""
    import transformers as tf

    configs = {
        "mixtral": (tf.MixtralConfig, {**GROUPED, "intermediate_size": 24, "num_local_experts": 5,
                                       "num_experts_per_tok": 2}),
        "qwen2_moe": (tf.Qwen2MoeConfig, {**GROUPED, "intermediate_size": 34, "moe_intermediate_size": 24,
                                          "shared_expert_intermediate_size": 28, "num_experts": 5,
                                          "num_experts_per_tok": 2, "mlp_only_layers": [0], "sliding_window": None}),
        "qwen3_moe": (tf.Qwen3MoeConfig, {**GROUPED, "head_dim": 10, "intermediate_size": 34,
                                          "moe_intermediate_size": 24, "num_local_experts": 5,
                                          "num_experts_per_tok": 2, "norm_topk_prob": True}),
        "deepseek_v2": (tf.DeepseekV2Config, {**BASE, **LATENT, "num_key_value_heads": 6, "intermediate_size": 34,
                                              "moe_intermediate_size": 24, "n_routed_experts": 5,
                                              "num_experts_per_tok": 2, "n_shared_experts": 2,
                                              "first_k_dense_replace": 1}),
        "deepseek_v3": (tf.DeepseekV3Config, {**BASE, **LATENT, "num_key_value_heads": 6, "intermediate_size": 34,
                                              "moe_intermediate_size": 24, "n_routed_experts": 12,
                                              "num_experts_per_tok": 3, "n_shared_experts": 1, "n_group": 4,
                                              "topk_group": 2, "first_k_dense_replace": 1}),
        "gpt_oss": (tf.GptOssConfig, {**GROUPED, "head_dim": 8, "intermediate_size": 24, "num_local_experts": 5,
                                      "num_experts_per_tok": 2}),
        "olmoe": (tf.OlmoeConfig, {**GROUPED, "intermediate_size": 24, "num_experts": 5, "num_experts_per_tok": 2}),
        "llama4_text": (tf.Llama4TextConfig, {**GROUPED, "head_dim": 8, "intermediate_size": 24,
                                              "intermediate_size_mlp": 34, "num_local_experts": 5,
                                              "num_experts_per_tok": 1, "attention_chunk_size": 32}),
        "granitemoe": (tf.GraniteMoeConfig, {**GROUPED, "intermediate_size": 24, "num_local_experts": 5,
                                             "num_experts_per_tok": 2, "attention_multiplier": 0.3}),
        "jamba": (tf.JambaConfig, {**GROUPED, "intermediate_size": 24, "num_experts": 5, "num_experts_per_tok": 2,
                                   "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
                                   "expert_layer_period": 2, "expert_layer_offset": 0, "mamba_d_state": 10,
                                   "mamba_dt_rank": 7, "use_mamba_kernels": False}),
        "mamba": (tf.MambaConfig, {"hidden_size": 24, "num_hidden_layers": 2, "vocab_size": 101, "state_size": 10,
                                   "time_step_rank": 7}),
        "mamba2": (tf.Mamba2Config, {"hidden_size": 24, "num_hidden_layers": 2, "vocab_size": 101, "state_size": 10,
                                     "num_heads": 6, "head_dim": 8, "n_groups": 2, "chunk_size": 16}),
        "bamba": (tf.BambaConfig, {**GROUPED, "intermediate_size": 24, "attn_layer_indices": [1], "mamba_n_heads": 6,
                                   "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 10,
                                   "mamba_chunk_size": 16}),
        "falcon_h1": (tf.FalconH1Config, {**GROUPED, "intermediate_size": 24, "mamba_d_ssm": 60, "mamba_n_heads": 6,
                                          "mamba_d_head": 10, "mamba_n_groups": 2, "mamba_d_state": 14,
                                          "mamba_chunk_size": 16}),
        "nemotron_h": (tf.NemotronHConfig, {
            **{k: v for k, v in GROUPED.items() if k != "num_hidden_layers"}, "head_dim": 8, "intermediate_size": 34,
            "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"], "ssm_state_size": 10,
            "mamba_num_heads": 6, "mamba_head_dim": 9, "n_groups": 2, "chunk_size": 16, "n_routed_experts": 5,
            "moe_intermediate_size": 24, "moe_shared_expert_intermediate_size": 28, "num_experts_per_tok": 2,
            "use_mamba_kernels": False}),
        "zamba2": (tf.Zamba2Config, {
            **{k: v for k, v in BASE.items() if k != "num_hidden_layers"}, "num_key_value_heads": 6,
            "num_hidden_layers": 4, "intermediate_size": 24,
            "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
            "mamba_d_state": 10, "mamba_ngroups": 2, "n_mamba_heads": 6, "mamba_expand": 2, "chunk_size": 16,
            "num_mem_blocks": 1, "use_mem_rope": True, "use_mamba_kernels": False}),
    }  # fmt: skip
    cls, values = configs[family]
    return cls(**{**values, **changes})


class Router(TorchDispatchMode):
    """Watches the choices of the best ``k``, and makes experts unchoosable.

    Args:
        experts: how many there are: the width of the routers' outputs, and of nothing else in the model.
        gone: expert numbers whose router logits become minus infinity.
    """

    def __init__(self, experts: int, gone: list[int] | None = None) -> None:
        super().__init__()
        self.experts, self.gone = experts, gone or []
        self.choices: list[torch.Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) and out.shape[1] == self.experts:
            out[:, self.gone] = -torch.inf
        if func is torch.ops.aten.topk.default and args[0].dim() == 2 and args[0].shape[1] == self.experts:
            self.choices.append(out[1].clone())
        return out


@torch.no_grad()
def cached_and_uncached(model: nn.Module, steps: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the last ``steps`` tokens of a text, read one by one with a cache and all at once without."""
    ids = torch.randint(3, model.config.vocab_size, (2, 6 + steps), generator=torch.Generator().manual_seed(7))
    whole = model(input_ids=ids, use_cache=False).logits[:, 6:]
    out = model(input_ids=ids[:, :6], use_cache=True)
    name = cache_argument(model)
    positions = "position_ids" in inspect.signature(model.forward).parameters
    parts = []
    for i in range(steps):
        # Given as generation gives them: some models count from zero when positions are missing.
        extra = {"position_ids": torch.full((2, 1), 6 + i)} if positions else {}
        out = model(input_ids=ids[:, 6 + i : 7 + i], use_cache=True, **{name: cache_of(out)}, **extra)
        parts.append(out.logits[:, -1])
    return torch.stack(parts, 1), whole


def without_member(group, member):
    """The group, one of its members forgotten."""
    return dataclasses.replace(group, members=tuple(m for m in group.members if m is not member))


def mixture(family: str, attention: str = "eager", experts: str | None = None, **changes) -> nn.Module:
    """A tiny float32 model whose experts are really chosen differently by different tokens."""
    import transformers as tf
    from transformers.utils import logging

    logging.set_verbosity_error()
    config = config_of(family, **changes)
    kwargs = {} if experts is None else {"experts_implementation": experts}
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation=attention, **kwargs).eval()
    return spread(model)


def spread(model: nn.Module) -> nn.Module:
    """Random weights of order one, routers' correction biases included, and state-space rates in their usual range."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if name.endswith("A_log"):
                p.copy_(0.5 * noise)
            elif p.dim() == 1:
                p.copy_(0.3 * noise + (1 if p.mean() > 0.5 else 0))
            else:
                fan = p.shape[-1] * (p.shape[1] if "conv" in name else 1)
                p.copy_(noise / max(fan, 8) ** 0.5 * 1.2)
        for b in model.buffers():
            if b.is_floating_point() and not b.any():
                b.copy_(0.1 * torch.randn(b.shape, generator=generator))
    return model
