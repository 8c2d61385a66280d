"""Multi-head latent attention: heads with their parts, compressed dimensions, rotary keys that all heads share."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers_discovery import half, logits, masked, permuted, sliced
from helpers_mixtures import cached_and_uncached, mixture, without_member

from pyprune.discovery import discover
from pyprune.surgery import apply

FAMILIES = ["deepseek_v2", "deepseek_v3"]
NOPE, ROPE, VALUE, HEADS = 12, 8, 14, 6


def attention_groups(groups, layer, role):
    return [g for g in groups if g.role == role and g.module == f"model.layers.{layer}.self_attn"]


@pytest.fixture(scope="module", params=FAMILIES)
def found(request):
    model = mixture(request.param)
    return model, discover(model)


def test_a_head_is_its_queries_its_keys_and_values_and_its_outputs(found):
    _, groups = found
    for layer in range(2):
        (heads,) = attention_groups(groups, layer, "kv_heads")
        path = f"model.layers.{layer}.self_attn."
        assert heads.prunable and heads.exact and heads.units == HEADS
        where = {m.tensor.removeprefix(path): (m.dim, m.index.positions()[0]) for m in heads.members}
        widths = {"q_b_proj.weight": NOPE + ROPE, "kv_b_proj.weight": NOPE + VALUE, "o_proj.weight": VALUE}
        assert where.keys() == widths.keys()
        for name, width in widths.items():
            assert where[name][0] == (1 if name.startswith("o_proj") else 0)
            assert np.array_equal(where[name][1], np.arange(HEADS * width).reshape(HEADS, width))


def test_compressed_dimensions_carry_their_norm_and_are_not_exact(found):
    _, groups = found
    for layer in range(2):
        queries, keys = sorted(attention_groups(groups, layer, "latent"), key=lambda g: -g.units)
        assert (queries.units, keys.units) == (22, 20) and not (queries.exact or keys.exact)
        assert queries.prunable and keys.prunable
        names = [{m.tensor.split(".")[-2] for m in g.members} for g in (queries, keys)]
        assert names[0] == {"q_a_proj", "q_a_layernorm", "q_b_proj"}
        assert names[1] == {"kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj"}
        rows = next(m for m in keys.members if "kv_a_proj" in m.tensor)
        # The last rows make the rotary key that all heads share.
        assert np.array_equal(rows.index.positions().ravel(), np.arange(20))


def test_rotary_pairs_of_the_shared_key_stay_with_the_queries_and_the_table(found):
    _, groups = found
    (rotary,) = [g for g in groups if g.role == "qk_dim" and g.module == "model"]
    assert rotary.units == ROPE // 2 and rotary.prunable and rotary.exact
    assert [m.tensor for m in rotary.members if not m.parameter] == ["model.rotary_emb.inv_freq"]
    shared = [m for m in rotary.members if "kv_a_proj" in m.tensor]
    queries = [m for m in rotary.members if "q_b_proj" in m.tensor]
    assert len(shared) == len(queries) == 2
    assert np.array_equal(np.sort(shared[0].index.positions().ravel()), 20 + np.arange(ROPE))
    every_head = (np.arange(HEADS)[:, None] * (NOPE + ROPE) + NOPE + np.arange(ROPE)).ravel()
    assert np.array_equal(np.sort(queries[0].index.positions().ravel()), every_head)


def test_unrotated_dimensions_are_chosen_in_every_head_by_itself(found):
    _, groups = found
    for layer in range(2):
        for role, size in (("qk_dim", NOPE), ("vo_dim", VALUE)):
            (group,) = attention_groups(groups, layer, role)
            assert (group.outer, group.units, group.exact) == (HEADS, size, True)
            assert group.within == f"model.layers.{layer}.self_attn:kv_heads"


def test_units_are_interchangeable_and_no_member_can_be_left_out(found):
    model, groups = found
    before = logits(model)
    for group in groups.prunable(["kv_heads", "qk_dim", "vo_dim", "latent"]):
        assert (logits(permuted(model, [group])) - before).abs().max() <= 1e-4, group.name
        for member in group.members:
            if member.parameter:
                change = (logits(permuted(model, [without_member(group, member)])) - before).abs().max()
                assert change > 1e-2, f"{group.name} without {member.tensor}"


@pytest.mark.parametrize("role", ["qk_dim", "vo_dim", "kv_heads"])
def test_slicing_equals_masking(found, role):
    model, groups = found
    plan = half(groups.prunable([role], exact=True))
    small = sliced(model, plan, groups)
    for module in small.modules():
        if role == "qk_dim" and hasattr(module, "qk_nope_head_dim"):
            module.qk_nope_head_dim, module.qk_rope_head_dim = NOPE // 2, ROPE // 2
            module.qk_head_dim = (NOPE + ROPE) // 2
        if role == "vo_dim" and hasattr(module, "v_head_dim"):
            module.v_head_dim = VALUE // 2
    expected = logits(masked(model, plan))
    assert (expected - logits(model)).abs().max() > 0.1
    assert (logits(small) - expected).abs().max() <= 1e-4


def test_surgery_cuts_heads_values_and_dense_ffn_and_the_cache_still_works(found):
    model, groups = found
    dense = [g for g in groups.prunable(["ffn"]) if g.layer == 0]
    plan = half([*groups.prunable(["kv_heads", "vo_dim"]), *dense])
    small = apply(model, plan, copy=True)
    assert small.config.num_attention_heads == HEADS // 2 and small.config.v_head_dim == VALUE // 2
    assert (logits(small) - logits(masked(model, plan))).abs().max() <= 1e-4
    cached, whole = cached_and_uncached(small)
    assert (cached - whole).abs().max() <= 1e-4


def test_surgery_lowers_the_ranks_and_the_norms_follow(found):
    model, groups = found
    small = apply(model, half(groups.prunable(["latent"])), copy=True)
    assert (small.config.q_lora_rank, small.config.kv_lora_rank) == (11, 10)
    assert small.model.layers[0].self_attn.kv_a_layernorm.weight.shape == (10,)
    cached, whole = cached_and_uncached(small)
    assert (cached - whole).abs().max() <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_queries_without_compression_are_part_of_their_head(family):
    model = mixture(family, q_lora_rank=None)
    groups = discover(model)
    (heads,) = attention_groups(groups, 0, "kv_heads")
    assert {m.tensor.split(".")[-2] for m in heads.members} == {"q_proj", "kv_b_proj", "o_proj"}
    assert [g.units for g in attention_groups(groups, 0, "latent")] == [20]
    assert (logits(permuted(model, [heads])) - logits(model)).abs().max() <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_are_the_same_with_the_fused_attention_kernel(family):
    eager, fused = (discover(mixture(family, attention)) for attention in ("eager", "sdpa"))
    assert eager.prunable() == fused.prunable()
    assert torch.equal(*(torch.tensor([g.units for g in x]) for x in (eager, fused)))
