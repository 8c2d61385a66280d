"""Members and positions of real architectures against maps derived by hand."""

from __future__ import annotations

import numpy as np
import pytest
from helpers_discovery import tiny

from pyprune.discovery import discover

ATTENTION = ["sdpa", "eager"]


def rows(*blocks):
    """Positions of one unit: ascending union of (start, length) runs."""
    return np.concatenate([np.arange(s, s + n) for s, n in blocks])


def check(group, expected, outer=1, units=None):
    """``expected``: (tensor, dim) -> function from (outer index, unit) to positions."""
    assert group.outer == outer
    assert units is None or group.units == units
    assert {(m.tensor, m.dim) for m in group.members} == set(expected)
    for m in group.members:
        positions = m.index.positions()
        assert positions.shape[:2] == (group.outer, group.units)
        for o in range(group.outer):
            for u in range(group.units):
                np.testing.assert_array_equal(positions[o, u], np.sort(expected[m.tensor, m.dim](o, u)), m.tensor)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "llama_bias"])
def test_grouped_heads_take_their_query_heads_along(family, attention):
    model = tiny(family, attention)
    groups = discover(model)
    kv, g, d = 3, 2, model.model.layers[0].self_attn.head_dim
    bias_qkv = family in ("qwen2", "llama_bias")
    for i in range(2):
        at = f"model.layers.{i}.self_attn"

        def q(_, u):
            return rows((u * g * d, g * d))

        def k(_, u):
            return rows((u * d, d))

        expected = {(f"{at}.q_proj.weight", 0): q, (f"{at}.k_proj.weight", 0): k, (f"{at}.v_proj.weight", 0): k,
                    (f"{at}.o_proj.weight", 1): q}  # fmt: skip
        if bias_qkv:
            expected |= {(f"{at}.q_proj.bias", 0): q, (f"{at}.k_proj.bias", 0): k, (f"{at}.v_proj.bias", 0): k}
        group = groups[f"{at}:kv_heads"]
        check(group, expected, units=kv)
        assert group.layer == i and group.exact and group.prunable and group.role == "kv_heads"

        def head(o, u):
            return rows(((o * g + u) * d, d))

        expected = {(f"{at}.q_proj.weight", 0): head, (f"{at}.o_proj.weight", 1): head}
        if bias_qkv:
            expected[f"{at}.q_proj.bias", 0] = head
        group = groups[f"{at}:query_heads"]
        check(group, expected, outer=kv, units=g)
        assert group.within == f"{at}:kv_heads" and group.exact

        expected = {(f"{at}.v_proj.weight", 0): lambda o, u: rows((o * d + u, 1)),
                    (f"{at}.o_proj.weight", 1): lambda o, u: (o * g + np.arange(g)) * d + u}  # fmt: skip
        if bias_qkv:
            expected[f"{at}.v_proj.bias", 0] = lambda o, u: rows((o * d + u, 1))
        group = groups[f"{at}:vo_dim"]
        check(group, expected, outer=kv, units=d)
        assert group.within == f"{at}:kv_heads" and group.exact


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_rotary_pairs_are_tied_through_the_table_of_the_whole_model(family, attention):
    model = tiny(family, attention)
    group = discover(model)["model:qk_dim"]
    d = model.model.layers[0].self_attn.head_dim
    r = d // 2
    expected = {("model.rotary_emb.inv_freq", 0): lambda _, u: np.array([u])}
    for i in range(2):
        at = f"model.layers.{i}.self_attn"
        expected[f"{at}.q_proj.weight", 0] = lambda _, u: np.add.outer(np.arange(6) * d, [u, u + r]).reshape(-1)
        expected[f"{at}.k_proj.weight", 0] = lambda _, u: np.add.outer(np.arange(3) * d, [u, u + r]).reshape(-1)
        if family == "qwen3":
            expected[f"{at}.q_norm.weight", 0] = lambda _, u: np.array([u, u + r])
            expected[f"{at}.k_norm.weight", 0] = lambda _, u: np.array([u, u + r])
    check(group, expected, units=r)
    assert group.layer is None and group.role == "qk_dim"
    assert group.exact == (family == "llama")  # Qwen3 normalises over the head's dimensions
    assert [m.parameter for m in group.members if m.tensor.endswith("inv_freq")] == [False]


@pytest.mark.parametrize("attention", ATTENTION)
def test_multi_head_attention_has_one_heads_axis(attention):
    groups = discover(tiny("llama_mha", attention))
    assert {g.role for g in groups} == {"kv_heads", "qk_dim", "vo_dim", "ffn", "hidden", "layers", "vocab"}
    at = "model.layers.1.self_attn"
    head = {(f"{at}.{n}_proj.weight", int(n == "o")): lambda _, u: rows((u * 8, 8)) for n in "qkvo"}
    check(groups[f"{at}:kv_heads"], head, units=6)


@pytest.mark.parametrize("attention", ATTENTION)
def test_a_single_kv_head_leaves_query_heads(attention):
    groups = discover(tiny("llama_mqa", attention))
    at = "model.layers.0.self_attn"
    group = groups[f"{at}:query_heads"]
    check(group, {(f"{at}.{n}_proj.weight", int(n == "o")): lambda _, u: rows((u * 8, 8)) for n in "qo"}, units=6)
    assert group.within is None and not [g for g in groups if g.role == "kv_heads"]


@pytest.mark.parametrize("attention", ATTENTION)
def test_fused_conv1d_attention_of_gpt2(attention):
    groups = discover(tiny("gpt2", attention))
    at = "transformer.h.1.attn"

    def qkv(_, u):
        return rows((u * 8, 8), (48 + u * 8, 8), (96 + u * 8, 8))

    check(
        groups[f"{at}:kv_heads"],
        {(f"{at}.c_attn.weight", 1): qkv, (f"{at}.c_attn.bias", 0): qkv,
         (f"{at}.c_proj.weight", 0): lambda _, u: rows((u * 8, 8))},
        units=6,
    )  # fmt: skip
    qk = {(f"{at}.c_attn.{n}", d): lambda o, u: np.array([o * 8 + u, 48 + o * 8 + u])
          for n, d in (("weight", 1), ("bias", 0))}  # fmt: skip
    check(groups[f"{at}.c_attn:qk_dim"], qk, outer=6, units=8)
    v = {(f"{at}.c_attn.{n}", d): lambda o, u: np.array([96 + o * 8 + u]) for n, d in (("weight", 1), ("bias", 0))}
    check(groups[f"{at}:vo_dim"], {**v, (f"{at}.c_proj.weight", 0): lambda o, u: np.array([o * 8 + u])}, 6, 8)
    mlp = "transformer.h.1.mlp"
    one = {(f"{mlp}.c_fc.weight", 1), (f"{mlp}.c_fc.bias", 0), (f"{mlp}.c_proj.weight", 0)}
    check(groups[f"{mlp}:ffn"], {k: lambda _, u: np.array([u]) for k in one}, units=192)
    assert groups.tied == {"lm_head.weight": "transformer.wte.weight"}
    assert groups.embeddings == {"transformer.wte.weight", "transformer.wpe.weight"}


@pytest.mark.parametrize("attention", ATTENTION)
def test_interleaved_fused_attention_and_partial_rotary_of_neox(attention):
    groups = discover(tiny("neox", attention))
    at = "gpt_neox.layers.0.attention"

    def fused(part):
        return {(f"{at}.query_key_value.{n}", 0): part for n in ("weight", "bias")}

    check(
        groups[f"{at}:kv_heads"],
        {**fused(lambda _, u: rows((u * 24, 24))), (f"{at}.dense.weight", 1): lambda _, u: rows((u * 8, 8))},
        units=6,
    )
    # Dimensions 0-3 of a head rotate (two pairs, tied through the whole model), 4-7 pass and are free in every head.
    check(groups[f"{at}.query_key_value:qk_dim"], fused(lambda o, u: 24 * o + np.array([4 + u, 12 + u])), 6, 4)
    rotary = groups["gpt_neox:qk_dim"]
    assert rotary.units == 2 and len(rotary.members) == 5 and rotary.outer == 1
    first = next(m for m in rotary.members if m.tensor == f"{at}.query_key_value.weight")
    np.testing.assert_array_equal(
        first.index.positions()[0, 1], np.sort(np.add.outer(np.arange(6) * 24, [1, 3, 9, 11]).reshape(-1))
    )
    assert groups[f"{at}:vo_dim"].outer == 6 and groups[f"{at}:vo_dim"].exact


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "neox", "llama_tied"])
def test_the_residual_stream_runs_through_every_weight_that_reads_or_writes_it(family):
    model = tiny(family)
    groups = discover(model)
    (hidden,) = [g for g in groups if g.role == "hidden"]
    assert hidden.units == 48 and not hidden.exact and hidden.prunable and hidden.layer is None
    members = {m.tensor for m in hidden.members}
    assert members == {n for n, p in model.named_parameters() if 48 in p.shape}
    for m in hidden.members:
        np.testing.assert_array_equal(m.index.positions()[0, :, 0], np.arange(48))


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox"])
def test_blocks_that_add_to_their_input_are_layers(family):
    model = tiny(family)
    (layers,) = [g for g in discover(model) if g.role == "layers"]
    assert layers.exact and layers.units == 2 and layers.members == ()
    assert len({id(model.get_submodule(m)) for m in layers.modules}) == 2


def test_what_produces_the_vocabulary_counts_as_an_embedding():
    assert discover(tiny("llama")).embeddings == {"model.embed_tokens.weight", "lm_head.weight"}
    tied = discover(tiny("llama_tied"))
    assert tied.embeddings == {"model.embed_tokens.weight"}
    assert tied.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    vocab = [g for g in tied if g.role == "vocab"]
    assert len(vocab) == 1 and "embed_tokens" in vocab[0].frozen and "aten.embedding" in vocab[0].frozen


def test_names_are_stable_and_in_model_order():
    names = [g.name for g in discover(tiny("llama"))]
    assert names == [
        "model.embed_tokens:vocab", ":hidden", "model.layers:layers",
        "model.layers.0.self_attn:kv_heads", "model.layers.0.self_attn:query_heads", "model:qk_dim",
        "model.layers.0.self_attn:vo_dim", "model.layers.0.mlp:ffn",
        "model.layers.1.self_attn:kv_heads", "model.layers.1.self_attn:query_heads",
        "model.layers.1.self_attn:vo_dim", "model.layers.1.mlp:ffn", "lm_head:vocab",
    ]  # fmt: skip
