"""Cuts that no configuration expresses are made by narrow linear layers."""

from __future__ import annotations

import copy

import helpers_surgery as h
import pytest
import torch
from helpers_families import build

from pyprune.discovery import discover
from pyprune.errors import PyPruneError
from pyprune.selection.plan import Plan
from pyprune.surgery import apply
from pyprune.surgery.narrow import NarrowConv1D, NarrowLinear


def half(model, *roles: str) -> Plan:
    """A random half of the units of every exact group of these roles (all roles when none is named)."""
    groups = [g for g in discover(model) if g.prunable and g.exact and g.role != "layers" and g.units > 1]
    return Plan(tuple(h.cut(g, g.units // 2) for g in groups if not roles or g.role in roles))


@pytest.mark.filterwarnings("ignore:No .* expresses")
@pytest.mark.parametrize("family", h.FAMILIES)
def test_slicing_half_of_every_exact_group_equals_masking_it(family):
    model = h.tiny(family)
    plan = half(model)
    assert len({c.group.role for c in plan.cuts}) >= 4
    masked = copy.deepcopy(model)
    h.mask_(masked, plan)
    small = apply(model, plan, verify=False)
    assert (h.logits(small) - h.logits(masked)).abs().max() <= 1e-4
    shapes = {n: tuple(t.shape) for n, t in [*masked.named_parameters(), *masked.named_buffers()]}
    planned = plan.new_shapes(shapes)
    assert all(tuple(p.shape) == planned[n] for n, p in small.named_parameters())


@pytest.mark.parametrize("role", ["qk_dim", "vo_dim"])
def test_dimensions_inside_heads_are_cut_with_a_warning(role):
    model = h.tiny("llama")
    before = {n: p.shape for n, p in model.named_parameters()}
    with pytest.warns(UserWarning, match="for pyprune.load and profile hetero-hf"):
        small = apply(model, half(model, role))
    name = {"qk_dim": "k_proj", "vo_dim": "v_proj"}[role]
    layer = small.model.layers[0].self_attn.get_submodule(name)
    assert isinstance(layer, NarrowLinear)
    assert layer.weight.shape == (before[f"model.layers.0.self_attn.{name}.weight"][0] // 2, 48)
    a, b = (small.generate(h.tokens(6), max_new_tokens=8, do_sample=False, use_cache=c) for c in (True, False))
    assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:No .* expresses")
@pytest.mark.parametrize("family", ["GPT-2", "OPT", "BLOOM"])
def test_narrower_heads_are_never_fewer_heads(family, tmp_path):
    """Half of every head's dimensions has the shapes of half of the heads."""
    model = build(family, tmp_path)
    small = apply(model, half(model, "qk_dim", "vo_dim"))
    assert small.config.num_attention_heads == 6
    assert any(isinstance(m, (NarrowLinear, NarrowConv1D)) for m in small.modules())


def test_transposed_layers_are_narrowed_too():
    model = h.tiny("gpt2")
    with pytest.warns(UserWarning, match="narrow"):
        small = apply(model, half(model, "vo_dim"))
    assert isinstance(small.transformer.h[0].attn.c_attn, NarrowConv1D)
    assert small.transformer.h[0].attn.c_attn.weight.shape == (48, 48 + 48 + 24)


def test_narrow_layers_train():
    model = h.tiny("llama")
    with pytest.warns(UserWarning, match="narrow"):
        small = apply(model, half(model, "vo_dim"))
    small(h.tokens(), labels=h.tokens()).loss.backward()
    assert small.model.layers[0].self_attn.v_proj.weight.grad.abs().sum() > 0


def test_stock_only_refuses_what_the_configuration_cannot_say_and_names_what_it_can():
    model = h.tiny("llama")
    with pytest.raises(PyPruneError, match=r"no LlamaConfig gives .* Leave vo_dim whole; kv_heads, ffn can be cut"):
        apply(model, half(model, "vo_dim", "kv_heads", "ffn"), stock_only=True)
    assert not any(p.is_meta for p in model.parameters())  # nothing happened to it


def test_tensors_that_no_linear_layer_holds_cannot_be_narrowed():
    model = h.tiny("gpt2")
    group = h.Group("wte:hidden", "hidden", "", None, 48, (h._member("transformer.wte.weight", 1, 48),), exact=False)
    with pytest.raises(PyPruneError, match=r"transformer.wte.weight.*no GPT2Config gives"):
        apply(model, Plan((h.cut(group, 30),)))


def test_a_narrow_layer_is_not_cut_again():
    model = h.tiny("llama")
    plan = half(model, "vo_dim")
    with pytest.warns(UserWarning, match="narrow"):
        small = apply(model, plan, copy=True)
    group = plan.cuts[0].group
    members = (h.Member(group.members[0].tensor, 0, h.IndexMap(1, 2, (h.Lattice(0, 0, 1),))),)
    again = h.Group("again", "vo_dim", group.module, 0, 2, members)
    with pytest.raises(PyPruneError, match="an earlier cut made a narrow layer"):
        apply(small, Plan((h.cut(again, 1),)))


def test_narrow_layers_keep_their_place_when_layers_before_them_go():
    model = h.tiny("llama")
    plan = half(model, "vo_dim")
    with pytest.warns(UserWarning, match="narrow"):
        small = apply(model, plan)
    layers = next(g for g in h.groups_of(h.tiny("llama")) if g.role == "layers")
    shorter = apply(small, Plan((h.Cut(layers, ((2, 3),)),)))
    assert isinstance(shorter.model.layers[1].self_attn.v_proj, NarrowLinear)
    assert h.logits(shorter).isfinite().all()


@pytest.mark.filterwarnings("ignore:No .* expresses")
def test_a_narrow_layer_inside_a_layer_with_widths_of_its_own_is_built_once():
    model = h.tiny("llama")
    groups = [g for g in discover(model) if g.role in ("vo_dim", "ffn") and g.layer == 1]
    plan = Plan(tuple(h.cut(g, g.units // 2) for g in groups))
    expected = copy.deepcopy(model)
    h.mask_(expected, plan)
    model = apply(model, plan)
    assert model.config.is_heterogeneous and "model.layers.1.self_attn.v_proj" in model.config.pyprune_narrow
    torch.testing.assert_close(h.logits(model), h.logits(expected))
