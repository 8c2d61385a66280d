"""Tiny random models, and groups written by hand for them: the truth that surgery is tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pyprune.discovery.groups import Group, Groups, IndexMap, Lattice, Member
from pyprune.selection.plan import Cut, Plan

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2")
STOCK = ("llama", "mistral", "qwen2", "qwen3")  # families whose cut models plain transformers opens
COMMON = {"vocab_size": 128, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
HEADS = {
    "hidden_size": 48, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 12, "intermediate_size": 40,
    "num_hidden_layers": 4, "max_position_embeddings": 64,
}  # fmt: skip


def tiny(name: str, seed: int = 0, **changes):
    """A model in evaluation mode, weights drawn so that every block matters."""
    import transformers as t

    torch.manual_seed(seed)
    if name == "gpt2":
        sizes = {"n_embd": 48, "n_head": 6, "n_layer": 4, "n_positions": 64}
        made = t.GPT2LMHeadModel(t.GPT2Config(**{**COMMON, **sizes, **changes}))
    else:
        config, cls = {
            "llama": (t.LlamaConfig, t.LlamaForCausalLM),
            "mistral": (t.MistralConfig, t.MistralForCausalLM),
            "qwen2": (t.Qwen2Config, t.Qwen2ForCausalLM),
            "qwen3": (t.Qwen3Config, t.Qwen3ForCausalLM),
        }[name]
        sizes = dict(HEADS)
        if name == "qwen2":
            del sizes["head_dim"]
        made = cls(config(**{**COMMON, **sizes, **changes}))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return made.eval()


def tokens(length: int = 12, batch: int = 2) -> torch.Tensor:
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(7))


def logits(made, vocabulary: int = 128) -> torch.Tensor:
    with torch.no_grad():
        return made(tokens().to(made.device) % vocabulary).logits


def _member(tensor: str, dim: int, units: int, *terms: Lattice, outer: int = 1, parameter: bool = True) -> Member:
    return Member(tensor, dim, IndexMap(outer, units, terms or (Lattice(0, 0, 1),)), parameter)


def llama_like(model) -> Groups:
    """Heads (KV, and query heads inside them), FFN channels, layers and the residual stream of a Llama-shaped model."""
    c = model.config
    width = c.head_dim if getattr(c, "head_dim", None) else c.hidden_size // c.num_attention_heads
    named = dict(model.named_parameters())
    groups: list[Group] = []
    hidden = [_member("model.embed_tokens.weight", 1, c.hidden_size), _member("model.norm.weight", 0, c.hidden_size)]
    if "lm_head.weight" in named:
        hidden.append(_member("lm_head.weight", 1, c.hidden_size))
    for i in range(c.num_hidden_layers):
        a, m = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        kv = named[f"{a}.k_proj.weight"].shape[0] // width
        per = named[f"{a}.q_proj.weight"].shape[0] // width // kv
        block = Lattice(0, 0, width, ((width, 1),))
        queries = Lattice(0, 0, per * width, ((per * width, 1),))
        inside = Lattice(0, per * width, width, ((width, 1),))
        members = [
            _member(f"{a}.q_proj.weight", 0, kv, queries),
            _member(f"{a}.k_proj.weight", 0, kv, block),
            _member(f"{a}.v_proj.weight", 0, kv, block),
            _member(f"{a}.o_proj.weight", 1, kv, queries),
        ]
        query_members = [
            _member(f"{a}.q_proj.weight", 0, per, inside, outer=kv),
            _member(f"{a}.o_proj.weight", 1, per, inside, outer=kv),
        ]
        for name, lattice in (("q", queries), ("k", block), ("v", block)):
            if f"{a}.{name}_proj.bias" in named:
                members.append(_member(f"{a}.{name}_proj.bias", 0, kv, lattice))
        if f"{a}.q_proj.bias" in named:
            query_members.append(_member(f"{a}.q_proj.bias", 0, per, inside, outer=kv))
        groups.append(Group(f"{a}:kv_heads", "kv_heads", a, i, kv, tuple(members)))
        if per > 1:
            groups.append(
                Group(f"{a}:query_heads", "query_heads", a, i, per, tuple(query_members), kv, f"{a}:kv_heads")
            )
        ffn = named[f"{m}.up_proj.weight"].shape[0]
        ffn_members = [_member(f"{m}.{n}_proj.weight", int(n == "down"), ffn) for n in ("gate", "up", "down")]
        groups.append(Group(f"{m}:ffn", "ffn", m, i, ffn, tuple(ffn_members)))
        for name in ("q", "k", "v"):
            hidden.append(_member(f"{a}.{name}_proj.weight", 1, c.hidden_size))
        hidden.append(_member(f"{a}.o_proj.weight", 0, c.hidden_size))
        hidden += [_member(f"{m}.{n}_proj.weight", int(n != "down"), c.hidden_size) for n in ("gate", "up", "down")]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            hidden.append(_member(f"model.layers.{i}.{norm}.weight", 0, c.hidden_size))
    groups.append(Group("model:hidden", "hidden", "model", None, c.hidden_size, tuple(hidden), exact=False))
    paths = tuple(f"model.layers.{i}" for i in range(c.num_hidden_layers))
    groups.append(Group("model:layers", "layers", "model", None, len(paths), (), exact=False, modules=paths))
    return _groups(model, groups)


def gpt2_like(model) -> Groups:
    """Heads, FFN channels and layers of a GPT-2: fused [hidden, q|k|v] matrices."""
    c = model.config
    groups: list[Group] = []
    width = getattr(c, "head_dim", None) or c.n_embd // c.n_head
    for i in range(c.n_layer):
        a, m = f"transformer.h.{i}.attn", f"transformer.h.{i}.mlp"
        inner = model.get_parameter(f"{a}.c_proj.weight").shape[0]
        heads = inner // width
        fused = tuple(Lattice(part * inner, 0, width, ((width, 1),)) for part in range(3))
        members = (
            _member(f"{a}.c_attn.weight", 1, heads, *fused),
            _member(f"{a}.c_attn.bias", 0, heads, *fused),
            _member(f"{a}.c_proj.weight", 0, heads, Lattice(0, 0, width, ((width, 1),))),
        )
        groups.append(Group(f"{a}:kv_heads", "kv_heads", a, i, heads, members))
        ffn = model.get_parameter(f"{m}.c_fc.weight").shape[1]
        ffn_members = (
            _member(f"{m}.c_fc.weight", 1, ffn),
            _member(f"{m}.c_fc.bias", 0, ffn),
            _member(f"{m}.c_proj.weight", 0, ffn),
        )
        groups.append(Group(f"{m}:ffn", "ffn", m, i, ffn, ffn_members))
    paths = tuple(f"transformer.h.{i}" for i in range(c.n_layer))
    groups.append(
        Group("transformer:layers", "layers", "transformer", None, len(paths), (), exact=False, modules=paths)
    )
    return _groups(model, groups)


def _groups(model, groups: Sequence[Group]) -> Groups:
    parameters = dict(model.named_parameters())
    shapes = {n: tuple(t.shape) for n, t in [*parameters.items(), *model.named_buffers()]}
    return Groups(list(groups), shapes, frozenset(parameters))


def cut(group: Group, width: int, seed: int = 0) -> Cut:
    """``width`` random units of every copy stay."""
    generator = torch.Generator().manual_seed(seed + group.units * 31 + (group.layer or 0))
    rows = []
    for _ in range(group.outer):
        rows.append(tuple(sorted(torch.randperm(group.units, generator=generator)[:width].tolist())))
    return Cut(group, tuple(rows))


def uniform_plan(groups: Groups, **widths: int) -> Plan:
    """The same widths in every layer, by role."""
    return Plan(tuple(cut(g, widths[g.role]) for g in groups if g.role in widths))


def ragged_plan(groups: Groups) -> Plan:
    """Different heads and FFN widths in every layer; the first layer stays whole."""
    cuts = []
    for group in groups:
        if group.role not in ("kv_heads", "query_heads", "ffn") or not group.layer:
            continue
        width = max(1, group.units - group.layer * (5 if group.role == "ffn" else 1))
        cuts.append(cut(group, width))
    return Plan(tuple(cuts))


def groups_of(model) -> Groups:
    return gpt2_like(model) if model.config.model_type == "gpt2" else llama_like(model)


def uniform(model) -> Plan:
    """3 of 4 KV heads (3 of 6 in GPT-2) and 23 FFN channels in every layer."""
    return uniform_plan(groups_of(model), kv_heads=3, ffn=23)


def ragged(model) -> Plan:
    return ragged_plan(groups_of(model))


def mask_(model, plan: Plan) -> None:
    """Sets the removed positions of every parameter to zero, in place."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for one in plan.cuts:
            for name, dim, gone in one.removed_positions():
                if name in parameters:
                    parameters[name].index_fill_(dim, torch.from_numpy(gone), 0.0)
