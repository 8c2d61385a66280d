"""Tiny random Llama models, and their groups written down by formula, independent of discovery."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pyprune.discovery.groups import Group, Groups, IndexMap, Lattice, Member


def tiny_llama(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """A Llama of 3 layers, hidden size 32, 4 query heads, 2 KV heads, head size 8, 24 FFN channels, 97 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    options: dict[str, Any] = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "tie_word_embeddings": False,
        "attention_dropout": 0.0, "initializer_range": 0.3,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**options, **changes}))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:  # biases are all zero and norms all one otherwise, and such a slip goes unseen
                p.add_(torch.randn_like(p), alpha=0.1)
    return model.to(dtype).eval()


def _axis(units: int, width: int = 1) -> IndexMap:
    """Units of ``width`` consecutive positions."""
    spread = ((width, 1),) if width > 1 else ()
    return IndexMap(1, units, (Lattice(0, 0, width, spread),))


def llama_groups(config: Any, model: nn.Module) -> Groups:
    """KV heads and FFN channels of each layer, then the residual stream.

    Args:
        config: a LlamaConfig.
        model: the model made from it, for the shapes of its tensors.
    """
    d, kv, ffn = config.head_dim, config.num_key_value_heads, config.intermediate_size
    queries = config.num_attention_heads // kv
    groups = []
    hidden = [Member("model.embed_tokens.weight", 1, _axis(config.hidden_size))]
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}"
        q = Member(f"{at}.self_attn.q_proj.weight", 0, _axis(kv, queries * d))
        k = Member(f"{at}.self_attn.k_proj.weight", 0, _axis(kv, d))
        v = Member(f"{at}.self_attn.v_proj.weight", 0, _axis(kv, d))
        o = Member(f"{at}.self_attn.o_proj.weight", 1, _axis(kv, queries * d))
        biases = [
            Member(f"{at}.self_attn.{n}_proj.bias", 0, m.index)
            for n, m in (("q", q), ("k", k), ("v", v))
            if config.attention_bias
        ]
        groups.append(Group(f"{at}.self_attn:kv_heads", "kv_heads", f"{at}.self_attn", i, kv, (q, k, v, o, *biases)))
        gate = Member(f"{at}.mlp.gate_proj.weight", 0, _axis(ffn))
        up = Member(f"{at}.mlp.up_proj.weight", 0, _axis(ffn))
        down = Member(f"{at}.mlp.down_proj.weight", 1, _axis(ffn))
        groups.append(Group(f"{at}.mlp:ffn", "ffn", f"{at}.mlp", i, ffn, (gate, up, down)))
        axis = _axis(config.hidden_size)
        hidden += [Member(f"{at}.input_layernorm.weight", 0, axis)]
        hidden += [Member(f"{at}.self_attn.{n}_proj.weight", 1, axis) for n in "qkv"]
        hidden += [
            Member(f"{at}.self_attn.o_proj.weight", 0, axis),
            Member(f"{at}.post_attention_layernorm.weight", 0, axis),
        ]
        hidden += [Member(f"{at}.mlp.{n}_proj.weight", 1, axis) for n in ("gate", "up")]
        hidden += [Member(f"{at}.mlp.down_proj.weight", 0, axis)]
    hidden.append(Member("model.norm.weight", 0, _axis(config.hidden_size)))
    tied = {}
    if config.tie_word_embeddings:
        tied["lm_head.weight"] = "model.embed_tokens.weight"
    else:
        hidden.append(Member("lm_head.weight", 1, _axis(config.hidden_size)))
    groups.append(Group("model:hidden", "hidden", "", None, config.hidden_size, tuple(hidden), exact=False))
    parameters = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return Groups(
        groups=groups,
        shapes=parameters | {name: tuple(b.shape) for name, b in model.named_buffers()},
        parameters=frozenset(parameters),
        embeddings=frozenset(n for n in ("model.embed_tokens.weight", "lm_head.weight") if n in parameters),
        tied=tied,
    )
