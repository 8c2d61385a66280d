"""Slicing equals masking, and units are interchangeable: what no wrong index map survives."""

from __future__ import annotations

import pytest
import torch
from helpers_discovery import half, logits, masked, permuted, sliced, tiny

from pyprune.discovery import discover

FAMILIES = ["llama", "llama_mha", "llama_mqa", "llama_tied", "llama_bias", "mistral", "qwen2", "qwen3", "gpt2", "neox"]
ATTENTION = ["sdpa", "eager"]


def adapt(model, old, plan, groups):
    """Set the size attributes of the attention modules of a hand-sliced model."""
    widths = {cut.group.role: cut.width for cut in plan.cuts}
    for module in model.modules():
        if hasattr(module, "num_key_value_groups") and "query_heads" in widths:
            module.num_key_value_groups = widths["query_heads"] if old != "llama_mqa" else module.num_key_value_groups
        if old == "gpt2" and hasattr(module, "split_size"):
            module.split_size = module.c_attn.weight.shape[1] // 3
            module.head_dim = widths.get("vo_dim", module.head_dim)
        if hasattr(module, "nf"):
            module.nf = module.weight.shape[1]
        if "vo_dim" in widths:
            if hasattr(module, "head_size"):
                module.head_size = widths["vo_dim"]
            elif hasattr(module, "head_dim"):
                module.head_dim = widths["vo_dim"]
    return model


def assert_equal_after(model, family, plan, groups):
    expected = logits(masked(model, plan))
    got = logits(adapt(sliced(model, plan, groups), family, plan, groups))
    assert (expected - logits(model)).abs().max() > 0.05, "the mask changes nothing: the check would be vacuous"
    assert (expected - got).abs().max() <= 1e-4


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("role", ["kv_heads", "query_heads", "ffn"])
def test_slicing_equals_masking(family, attention, role):
    model = tiny(family, attention)
    groups = discover(model)
    chosen = groups.prunable([role], exact=True)
    if not chosen:
        present = {"kv_heads": family != "llama_mqa", "query_heads": family not in ("llama_mha", "gpt2", "neox")}
        assert not present.get(role, True)
        return
    if family == "llama_mqa" and role == "query_heads":
        plan = half(chosen)
        for module in model.modules():
            if hasattr(module, "num_key_value_groups"):
                module.num_key_value_groups = 6
        small = sliced(model, plan, groups)
        for module in small.modules():
            if hasattr(module, "num_key_value_groups"):
                module.num_key_value_groups = 3
        assert (logits(masked(model, plan)) - logits(small)).abs().max() <= 1e-4
        return
    assert_equal_after(model, family, half(chosen), groups)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("family", ["llama", "llama_mha", "llama_bias", "mistral", "qwen2", "gpt2"])
def test_slicing_head_dimensions_equals_masking_when_the_scale_is_kept(family, attention):
    model = tiny(family, attention)
    groups = discover(model)
    chosen = groups.prunable(["qk_dim", "vo_dim"], exact=True)
    assert {g.role for g in chosen} == {"qk_dim", "vo_dim"}
    assert_equal_after(model, family, half(chosen), groups)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_all_exact_groups_at_once(family, attention):
    model = tiny(family, attention)
    groups = discover(model)
    chosen = groups.prunable(["kv_heads", "query_heads", "ffn"], exact=True)
    assert_equal_after(model, family, half(chosen, seed=3), groups)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("family", FAMILIES)
def test_units_of_every_group_are_interchangeable(family, attention):
    model = tiny(family, attention)
    groups = [g for g in discover(model).prunable() if g.role != "layers"]
    before = logits(model)
    for g in groups:
        shuffled = permuted(model, [g])
        assert (logits(shuffled) - before).abs().max() <= 2e-4, g.name
        dropped = [m for m in g.members if m.parameter and "norm" not in m.tensor][:1]
        partial = type(g)(**{**vars(g), "members": tuple(m for m in g.members if m not in dropped)})
        if dropped and len(g.members) > 1:
            change = (logits(permuted(model, [partial])) - before).abs().max()
            assert change > 1e-3, f"{g.name}: shuffling all but {dropped[0].tensor} changes nothing"


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "neox"])
def test_shuffling_all_groups_together_changes_nothing(family):
    model = tiny(family)
    groups = [g for g in discover(model).prunable() if g.role != "layers"]
    # Inner units first: an index map speaks of positions in the unshuffled outer axis.
    groups.sort(key=lambda g: g.within is None)
    assert (logits(permuted(model, groups)) - logits(model)).abs().max() <= 2e-4


def test_removing_a_layer_equals_zeroing_its_weights():
    model = tiny("llama")
    expected = tiny("llama")
    with torch.no_grad():
        for p in expected.model.layers[1].parameters():
            p.zero_()
    model.model.layers = model.model.layers[:1]
    assert (logits(model) - logits(expected)).abs().max() <= 1e-4
