"""Tiny models and the oracle: what zeroing and slicing do, without the surgery package."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

from pyprune.discovery.groups import Group, Groups
from pyprune.selection.plan import Cut, Plan

SIZES = dict(hidden_size=48, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6, vocab_size=101,
             bos_token_id=1, eos_token_id=2, pad_token_id=0)  # fmt: skip


def tiny(family: str, attention: str = "sdpa", **changes):
    """A float32 causal LM of two layers whose signals are of order one, with biases and norms that matter."""
    import transformers as tf
    from transformers.utils import logging

    logging.set_verbosity_error()
    gqa = {**SIZES, "num_key_value_heads": 3, "head_dim": 8}
    gpt2 = dict(n_embd=48, n_layer=2, n_head=6, n_positions=64, vocab_size=101, bos_token_id=1, eos_token_id=2)
    configs = {
        "llama": lambda: tf.LlamaConfig(**{**gqa, **changes}),
        "llama_mha": lambda: tf.LlamaConfig(**{**gqa, "num_key_value_heads": 6, **changes}),
        "llama_mqa": lambda: tf.LlamaConfig(**{**gqa, "num_key_value_heads": 1, **changes}),
        "llama_tied": lambda: tf.LlamaConfig(**{**gqa, "tie_word_embeddings": True, **changes}),
        "llama_bias": lambda: tf.LlamaConfig(**{**gqa, "attention_bias": True, "mlp_bias": True, **changes}),
        "mistral": lambda: tf.MistralConfig(**{**gqa, "sliding_window": 4, **changes}),
        "qwen2": lambda: tf.Qwen2Config(**{**{k: v for k, v in gqa.items() if k != "head_dim"}, **changes}),
        "qwen3": lambda: tf.Qwen3Config(**{**gqa, "head_dim": 10, **changes}),
        "gpt2": lambda: tf.GPT2Config(**{**gpt2, **changes}),
        "neox": lambda: tf.GPTNeoXConfig(
            **{**SIZES, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
               **changes}
        ),
    }  # fmt: skip
    model = tf.AutoModelForCausalLM.from_config(configs[family](), attn_implementation=attention).eval()
    return liven(model)


def liven(model: nn.Module) -> nn.Module:
    """Random weights whose products are of order one: with transformers' 0.02 every check would pass vacuously."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise / max(p.shape) ** 0.5 * 1.5 if p.dim() > 1 else 0.3 * noise + (1 if p.mean() > 0.5 else 0))
    return model


def token_ids(model: nn.Module) -> torch.Tensor:
    return torch.randint(3, model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=token_ids(model), use_cache=False).logits.float()


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def half(groups: list[Group], seed: int = 0) -> Plan:
    """A plan that keeps a random half of every group's units, chosen separately in each copy."""
    rng = np.random.default_rng(seed)
    cuts = []
    for g in groups:
        keep = max(g.units // 2, 1)
        rows = tuple(tuple(sorted(rng.choice(g.units, keep, replace=False).tolist())) for _ in range(g.outer))
        cuts.append(Cut(g, rows))
    return Plan(tuple(cuts))


def masked(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy with the removed slices of every member zeroed."""
    out = copy.deepcopy(model)
    tensors = tensors_of(out)
    with torch.no_grad():
        for cut in plan.cuts:
            for name, dim, gone in cut.removed_positions():
                tensors[name].index_fill_(dim, torch.from_numpy(gone), 0)
    return out


def sliced(model: nn.Module, plan: Plan, groups: Groups) -> nn.Module:
    """A copy with those slices cut out; attributes that hold sizes are the caller's."""
    out = copy.deepcopy(model)
    stay = plan.kept_positions(groups.shapes)
    for prefix, module in out.named_modules():
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                for dim, kept in stay.get(f"{prefix}.{key}" if prefix else key, {}).items():
                    tensor = tensor.detach().index_select(dim, torch.from_numpy(kept))
                    table[key] = nn.Parameter(tensor) if table is module._parameters else tensor
    if groups.tied:
        out.tie_weights()
    return out


def permuted(model: nn.Module, groups: list[Group], seed: int = 0) -> nn.Module:
    """A copy with every group's units shuffled (in each copy separately), the same way in all of its members."""
    out = copy.deepcopy(model)
    tensors = tensors_of(out)
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for g in groups:
            order = np.stack([_cycle(rng, g.units) for _ in range(g.outer)])
            for m in g.members:
                positions = aligned_positions(m.index)
                source = np.arange(tensors[m.tensor].shape[m.dim])
                shuffled = np.take_along_axis(positions, order[:, :, None], axis=1)
                source[positions.reshape(-1)] = shuffled.reshape(-1)
                tensors[m.tensor].copy_(tensors[m.tensor].index_select(m.dim, torch.from_numpy(source)).clone())
    return out


def _cycle(rng: np.random.Generator, n: int) -> np.ndarray:
    """A random permutation of one cycle: nothing stays in place."""
    chain, out = rng.permutation(n), np.empty(n, dtype=np.int64)
    out[chain] = np.roll(chain, 1)
    return out


def aligned_positions(index) -> np.ndarray:
    """[outer, units, k] with the k positions of two units in corresponding order."""
    parts = []
    for t in index.terms:
        inner = np.zeros(1, dtype=np.int64)
        for count, stride in t.spread:
            inner = (inner[:, None] + np.arange(count) * stride).reshape(-1)
        o, u = np.arange(index.outer)[:, None, None], np.arange(index.units)[None, :, None]
        parts.append(t.offset + o * t.outer_stride + u * t.unit_stride + inner)
    return np.concatenate(parts, axis=-1)
