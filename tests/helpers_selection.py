"""Hand-built groups of Llama-like models: every role, no model, no discovery."""

from __future__ import annotations

import torch

from pyprune.discovery.groups import Group, Groups, IndexMap, Lattice, Member
from pyprune.importance.scores import Scores


def llama_groups(
    layers: int = 2,
    hidden: int = 16,
    kv: int = 2,
    queries: int = 2,
    head_dim: int = 4,
    ffn: int | list[int] = 12,
    vocab: int = 50,
    experts: int = 0,
    fused: bool = False,
    tied: bool = True,
) -> Groups:
    """Groups of a decoder with ``kv`` KV heads of ``queries`` query heads each.

    Args:
        ffn: channels, the same in every layer or one number a layer.
        experts: 0 for a plain FFN, else stacked experts with ``ffn`` channels each and a router.
        fused: queries, keys and values in one projection, one after the other.
        tied: the output head is the embedding.
    """
    heads, d = kv * queries, head_dim
    widths = [ffn] * layers if isinstance(ffn, int) else ffn
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    groups: list[Group] = []
    stream = [Member("model.embed_tokens.weight", 1, _plain(hidden))]
    rotary = []
    for i in range(layers):
        at, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        o = f"{at}.o_proj.weight"
        if fused:
            q = k = v = f"{at}.qkv_proj.weight"
            q_at, k_at, v_at = 0, heads * d, (heads + kv) * d
            shapes[q] = ((heads + 2 * kv) * d, hidden)
            stream.append(Member(q, 1, _plain(hidden)))
        else:
            q, k, v = (f"{at}.{n}_proj.weight" for n in "qkv")
            q_at = k_at = v_at = 0
            shapes |= {q: (heads * d, hidden), k: (kv * d, hidden), v: (kv * d, hidden)}
            stream += [Member(t, 1, _plain(hidden)) for t in (q, k, v)]
        shapes[o] = (hidden, heads * d)
        stream.append(Member(o, 0, _plain(hidden)))
        per_kv = ((queries * d, 1),)
        heads_of = _rows(
            1, kv, [(q, q_at, 0, queries * d, per_kv), (k, k_at, 0, d, ((d, 1),)), (v, v_at, 0, d, ((d, 1),))]
        )
        heads_of.append(Member(o, 1, IndexMap(1, kv, (Lattice(0, 0, queries * d, per_kv),))))
        groups.append(Group(f"{at}:kv_heads", "kv_heads", at, i, kv, tuple(heads_of)))
        inside = IndexMap(kv, queries, (Lattice(q_at, queries * d, d, ((d, 1),)),))
        inside_o = IndexMap(kv, queries, (Lattice(0, queries * d, d, ((d, 1),)),))
        groups.append(
            Group(f"{at}:query_heads", "query_heads", at, i, queries, (Member(q, 0, inside), Member(o, 1, inside_o)),
                  outer=kv, within=f"{at}:kv_heads")
        )  # fmt: skip
        values = IndexMap(kv, d, (Lattice(v_at, d, 1),))
        values_o = IndexMap(kv, d, (Lattice(0, queries * d, 1, ((queries, d),)),))
        groups.append(
            Group(f"{at}:vo_dim", "vo_dim", at, i, d, (Member(v, 0, values), Member(o, 1, values_o)),
                  outer=kv, within=f"{at}:kv_heads")
        )  # fmt: skip
        half = d // 2
        rotary += _rows(1, half, [(q, q_at, 0, 1, ((heads, d), (2, half))), (k, k_at, 0, 1, ((kv, d), (2, half)))])
        groups += _ffn(i, mlp, hidden, widths[i], experts, shapes, stream)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{i}.{norm}.weight"] = (hidden,)
            stream.append(Member(f"model.layers.{i}.{norm}.weight", 0, _plain(hidden)))
    shapes |= {"model.norm.weight": (hidden,), "model.rotary_emb.inv_freq": (head_dim // 2,)}
    stream.append(Member("model.norm.weight", 0, _plain(hidden)))
    rotary.append(Member("model.rotary_emb.inv_freq", 0, _plain(head_dim // 2), parameter=False))
    embeddings = {"model.embed_tokens.weight"}
    if not tied:
        shapes["lm_head.weight"] = (vocab, hidden)
        stream.append(Member("lm_head.weight", 1, _plain(hidden)))
        embeddings.add("lm_head.weight")
    groups.append(Group("model:qk_dim", "qk_dim", "model", None, head_dim // 2, tuple(rotary)))
    groups.append(Group("model:hidden", "hidden", "model", None, hidden, tuple(stream), exact=False))
    groups.append(
        Group("model.layers:layers", "layers", "model.layers", None, layers, (),
              modules=tuple(f"model.layers.{i}" for i in range(layers)))
    )  # fmt: skip
    vocabulary = (Member("model.embed_tokens.weight", 0, _plain(vocab)),)
    groups.append(Group("model:vocab", "vocab", "", None, vocab, vocabulary, frozen="indexed by token ids"))
    parameters = frozenset(shapes) - {"model.rotary_emb.inv_freq"}
    return Groups(groups, shapes, parameters, frozenset(embeddings))


def smollm2_groups() -> Groups:
    return llama_groups(layers=30, hidden=576, kv=3, queries=3, head_dim=64, ffn=1536, vocab=49152)


def llama_7b_groups() -> Groups:
    return llama_groups(layers=32, hidden=4096, kv=32, queries=1, head_dim=128, ffn=11008, vocab=32000, tied=False)


def random_scores(groups: Groups, seed: int = 0, heavy: bool = False) -> Scores:
    """Scores for every group: normal ones, or log-normal ones as importance really is."""
    generator = torch.Generator().manual_seed(seed)
    values = {g.name: torch.randn(g.outer, g.units, generator=generator) for g in groups}
    return Scores({k: v.exp() if heavy else v for k, v in values.items()}, "random")


def _plain(n: int) -> IndexMap:
    return IndexMap(1, n, (Lattice(0, 0, 1),))


def _rows(outer: int, units: int, parts: list[tuple]) -> list[Member]:
    """Members along dim 0; parts of one tensor become one member with several terms."""
    terms: dict[str, list[Lattice]] = {}
    for tensor, *lattice in parts:
        terms.setdefault(tensor, []).append(Lattice(*lattice))
    return [Member(t, 0, IndexMap(outer, units, tuple(v))) for t, v in terms.items()]


def _ffn(i: int, mlp: str, hidden: int, width: int, experts: int, shapes: dict, stream: list[Member]) -> list[Group]:
    if not experts:
        gate, up, down = (f"{mlp}.{n}_proj.weight" for n in ("gate", "up", "down"))
        shapes |= {gate: (width, hidden), up: (width, hidden), down: (hidden, width)}
        stream += [Member(gate, 1, _plain(hidden)), Member(up, 1, _plain(hidden)), Member(down, 0, _plain(hidden))]
        members = (Member(gate, 0, _plain(width)), Member(up, 0, _plain(width)), Member(down, 1, _plain(width)))
        return [Group(f"{mlp}:ffn", "ffn", mlp, i, width, members)]
    router, both, down = f"{mlp}.gate.weight", f"{mlp}.experts.gate_up_proj", f"{mlp}.experts.down_proj"
    shapes |= {router: (experts, hidden), both: (experts, hidden, 2 * width), down: (experts, width, hidden)}
    stream += [Member(router, 1, _plain(hidden)), Member(both, 1, _plain(hidden)), Member(down, 2, _plain(hidden))]
    of_experts = tuple(Member(t, 0, _plain(experts)) for t in (router, both, down))
    halves = IndexMap(1, width, (Lattice(0, 0, 1), Lattice(width, 0, 1)))
    channels = (Member(both, 2, halves), Member(down, 1, _plain(width)))
    return [
        Group(f"{mlp}:experts", "experts", mlp, i, experts, of_experts),
        Group(f"{mlp}:expert_ffn", "expert_ffn", mlp, i, width, channels),
    ]
