"""The count that budgets are met with equals the shapes that the plan gives."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from helpers_selection import llama_groups, random_scores
from hypothesis import given, settings
from hypothesis import strategies as st

from pyprune.discovery.groups import Groups
from pyprune.selection.accounting import Accounting
from pyprune.selection.details import measure
from pyprune.selection.plan import Cut, Plan
from pyprune.selection.units import keep, removal_order, without_removed_layers

ROLES = ("kv_heads", "query_heads", "qk_dim", "vo_dim", "ffn", "experts", "expert_ffn", "hidden", "layers")


@st.composite
def models(draw: st.DrawFn) -> Groups:
    layers = draw(st.integers(1, 4))
    experts = draw(st.sampled_from([0, 0, 3]))
    return llama_groups(
        layers=layers,
        hidden=draw(st.integers(2, 9)),
        kv=draw(st.integers(1, 3)),
        queries=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from([2, 4, 6])),
        ffn=draw(st.lists(st.integers(1, 11), min_size=layers, max_size=layers)),
        vocab=draw(st.integers(2, 20)),
        experts=experts,
        fused=draw(st.booleans()),
        tied=draw(st.booleans()),
    )


def counted(groups: Groups, shapes: dict[str, tuple[int, ...]], count_embeddings: bool) -> int:
    names = groups.parameters if count_embeddings else groups.parameters - groups.embeddings
    return sum(prod(shapes[n]) for n in names if n in shapes)


@settings(max_examples=150, deadline=None)
@given(groups=models(), data=st.data(), count_embeddings=st.booleans())
def test_the_count_equals_the_new_shapes_for_any_widths_of_any_roles(
    groups: Groups, data: st.DataObject, count_embeddings: bool
) -> None:
    roles = data.draw(st.sets(st.sampled_from(ROLES), min_size=1))
    cut = groups.prunable(roles)
    scores = random_scores(groups, data.draw(st.integers(0, 99)))
    order = {g.name: removal_order(scores[g.name].double().numpy()) for g in cut}
    widths = {g.name: data.draw(st.integers(1, g.units)) for g in cut}
    first_to_go = {g.name: order[g.name][0] for g in cut if g.role == "layers"}
    counts = Accounting(groups, cut, first_to_go, count_embeddings)
    plan = Plan(without_removed_layers(keep(g, order[g.name], widths[g.name]) for g in cut))
    assert counts.count(widths) == counted(groups, plan.new_shapes(groups.shapes), count_embeddings)
    assert counts.count({}) == groups.num_parameters(count_embeddings)


def test_the_cost_of_a_unit_is_what_removing_it_alone_saves() -> None:
    groups = llama_groups(layers=3, experts=4)
    cut = groups.prunable(["kv_heads", "query_heads", "expert_ffn", "experts", "hidden", "qk_dim"])
    counts = Accounting(groups, cut, {})
    for g in cut:
        assert counts.cost(g) == groups.parameters_per_unit(g) * g.outer, g.name
        assert counts.cost(g) == counts.count({}) - counts.count({g.name: g.units - 1}), g.name


def test_the_cost_of_a_layer_is_the_mean_over_layers() -> None:
    groups = llama_groups(layers=2, hidden=8, ffn=[4, 8])
    layers = groups["model.layers:layers"]
    counts = Accounting(groups, [layers], {layers.name: np.array([0, 1])})
    inside = sum(groups.numel(p) for p in groups.parameters if p.startswith("model.layers."))
    assert counts.cost(layers) == inside / 2


def test_embeddings_are_left_out_of_costs_when_they_do_not_count() -> None:
    groups = llama_groups(vocab=1000, hidden=8)
    hidden = groups["model:hidden"]
    with_them, without = (Accounting(groups, [hidden], {}, flag).cost(hidden) for flag in (True, False))
    assert with_them - without == 1000


def test_measure_reports_both_countings() -> None:
    groups = llama_groups(layers=1, hidden=8, ffn=4, vocab=100)
    ffn = groups["model.layers.0.mlp:ffn"]
    achieved = measure(groups, Plan((Cut(ffn, ((0, 3),)),)))
    gone = 2 * 3 * 8
    for key, before in (
        ("with_embeddings", groups.num_parameters()),
        ("without_embeddings", groups.num_parameters(False)),
    ):
        assert achieved[key] == {"before": before, "after": before - gone, "ratio": pytest.approx(gone / before)}
