"""State-space models and hybrids: inner channels, heads and states of the mixers, and what stands beside them."""

from __future__ import annotations

import pytest
from helpers_discovery import half, logits, masked, permuted
from helpers_mixtures import cached_and_uncached, mixture, spread, without_member
from torch import nn

from pyprune.discovery import discover
from pyprune.discovery.groups import Groups
from pyprune.surgery import apply

FAMILIES = ["mamba", "mamba2", "jamba", "bamba", "falcon_h1", "nemotron_h", "zamba2"]
MIXER = ("channels", "state", "latent")


@pytest.fixture(scope="module")
def known():
    """Models and their groups, found once."""
    store: dict[str, tuple[nn.Module, Groups]] = {}

    def get(family: str) -> tuple[nn.Module, Groups]:
        if family not in store:
            model = mixture(family)
            store[family] = model, discover(model)
        return store[family]

    return get


def mixer(groups, suffix):
    """The first mixer's groups: role -> [(units, exact)]."""
    module = next(g.module for g in groups if g.role == "state")
    out: dict[str, list[tuple[int, bool]]] = {}
    for g in groups.prunable(MIXER):
        if g.module == module and module.endswith(suffix):
            out.setdefault(g.role, []).append((g.units, g.exact))
    return out


@pytest.mark.parametrize(
    ("family", "suffix", "expected"),
    [
        ("mamba", "0.mixer", {"channels": [(48, True)], "state": [(10, True)], "latent": [(7, True)]}),
        # Norms run over the state and the time step's rank.
        ("jamba", "0.mamba", {"channels": [(96, True)], "state": [(10, False)], "latent": [(7, False)]}),
        # Groups of heads, heads in a group, width of a head; a norm runs over each group.
        ("mamba2", "0.mixer", {"channels": [(2, True), (3, False), (8, False)], "state": [(10, True)]}),
        ("bamba", "0.mamba", {"channels": [(2, True), (3, False), (16, False)], "state": [(10, True)]}),
        ("nemotron_h", "0.mixer", {"channels": [(2, True), (3, False), (9, False)], "state": [(10, True)]}),
        ("zamba2", "0.mamba", {"channels": [(2, True), (3, False), (16, False)], "state": [(10, True)]}),
        # No norm.
        ("falcon_h1", "0.mamba", {"channels": [(2, True), (3, True), (10, True)], "state": [(14, True)]}),
    ],
)
def test_a_mixer_has_channels_and_states(family, suffix, expected, known):
    groups = known(family)[1]
    assert mixer(groups, suffix) == expected
    assert not groups.warnings


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_inside_a_mixer_is_an_ffn_or_a_head(family, known):
    for group in known(family)[1]:
        members = {m.tensor for m in group.members}
        if any("conv1d" in name for name in members):
            assert group.role in ("channels", "state", "hidden")


def test_convolution_taps_stay(known):
    frozen = [g for g in known("mamba")[1] if g.role == "channels" and g.frozen]
    assert len(frozen) == 2 and all("convolved over" in g.frozen and g.units == 4 for g in frozen)


@pytest.mark.parametrize("family", FAMILIES)
def test_units_are_interchangeable_and_no_member_can_be_left_out(family, known):
    model, groups = known(family)
    before = logits(model)
    modules: set[str] = set()
    for group in groups.prunable([*MIXER, "kv_heads", "ffn"]):
        assert (logits(permuted(model, [group])) - before).abs().max() <= 1e-4, group.name
        first = next(g.module for g in groups.prunable([group.role]))
        if group.role in MIXER and group.module == first:
            modules.add(group.module)
            for member in group.members:
                if member.parameter:
                    change = (logits(permuted(model, [without_member(group, member)])) - before).abs().max()
                    assert change > 1e-2, f"{group.name} without {member.tensor}"
    assert modules


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("mamba", "channels"), ("mamba", "state"), ("mamba", "latent"), ("jamba", "channels"), ("mamba2", "state"),
        ("mamba2", "channels"), ("bamba", "state"), ("bamba", "channels"), ("falcon_h1", "state"),
        ("falcon_h1", "channels"), ("falcon_h1", "channels.2"), ("nemotron_h", "state"), ("nemotron_h", "channels"),
    ],
)  # fmt: skip
def test_slicing_equals_masking_and_the_cache_still_works(family, kind, known):
    model, groups = known(family)
    chosen = [g for g in groups.prunable(exact=True) if g.name.endswith(f":{kind}")]
    plan = half(chosen)
    small = apply(model, plan, copy=True)
    expected = logits(masked(model, plan))
    assert (expected - logits(model)).abs().max() > 0.05
    assert (logits(small) - expected).abs().max() <= 1e-4
    cached, whole = cached_and_uncached(small)
    assert (cached - whole).abs().max() <= 1e-4


@pytest.mark.parametrize("family", ["nemotron_h", "falcon_h1"])
def test_ffn_and_states_of_a_hybrid_go_together(family, known):
    model, groups = known(family)
    chosen = groups.prunable(["ffn", "expert_ffn", "state"], exact=True)
    assert {g.role for g in chosen} >= {"ffn", "state"}
    plan = half(chosen)
    assert (logits(apply(model, plan, copy=True)) - logits(masked(model, plan))).abs().max() <= 1e-4


def test_a_transformer_shared_by_layers_is_one_set_of_groups(known):
    model, groups = known("zamba2")
    heads = groups.prunable(["kv_heads"])
    assert len(heads) == 1 and heads[0].module == "model.layers.1.shared_transformer.self_attn"
    assert groups.tied
    plan = half(heads)
    assert (logits(masked(model, plan)) - logits(model)).abs().max() > 0.1
    # What each layer does to the shared block's output is not the residual stream.
    assert len([g for g in groups if g.role == "hidden"]) == 1


def test_the_key_dimension_of_linear_attention_is_a_state_whose_scale_the_model_computes():
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    config = Qwen3NextConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3, head_dim=8, vocab_size=101,
        intermediate_size=34, moe_intermediate_size=24, shared_expert_intermediate_size=28, num_experts=5,
        num_experts_per_tok=2, layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2,
        linear_num_value_heads=4, linear_key_head_dim=6, linear_value_head_dim=10,
    )  # fmt: skip
    model = spread(Qwen3NextForCausalLM(config).eval())
    groups = discover(model)
    assert not groups.warnings
    (state,) = groups.prunable(["state"])
    assert state.module == "model.layers.0.linear_attn" and state.units == 6 and not state.exact
    before = logits(model)
    for group in groups.prunable(["state", "channels", "experts", "expert_ffn"]):
        assert (logits(permuted(model, [group])) - before).abs().max() <= 1e-4, group.name
        for member in group.members:
            if member.parameter and member.tensor.startswith(f"{state.module}."):
                change = (logits(permuted(model, [without_member(group, member)])) - before).abs().max()
                assert change > 1e-3, f"{group.name} without {member.tensor}"
