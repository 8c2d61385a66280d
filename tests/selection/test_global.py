"""Allocation ``global``: heads and channels of all layers in one ranking."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers_selection import llama_groups, random_scores, smollm2_groups
from hypothesis import given, settings
from hypothesis import strategies as st

from pyprune.importance.scores import Scores
from pyprune.selection import select
from pyprune.selection.accounting import Accounting
from pyprune.selection.global_ranking import comparable

SMOLLM2 = smollm2_groups()
SMOLLM2_SCORES = random_scores(SMOLLM2, heavy=True)


def removed(plan, role: str) -> int:
    return sum(c.group.units - c.width for c in plan.cuts if c.group.role == role)


def scaled(scores: Scores, role: str, by: float) -> Scores:
    return Scores({k: v * by if k.endswith(":" + role) else v for k, v in scores.items()}, scores.criterion)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_heads_and_channels_are_both_removed_whatever_the_scale_of_their_scores(ratio: float, scale: float) -> None:
    plan = select(SMOLLM2, scaled(SMOLLM2_SCORES, "kv_heads", scale), ratio, allocation="global")
    assert removed(plan, "kv_heads") > 0
    assert removed(plan, "ffn") > 0
    same = select(SMOLLM2, SMOLLM2_SCORES, ratio, allocation="global")
    assert removed(plan, "kv_heads") == removed(same, "kv_heads")


def test_layers_whose_units_matter_less_lose_more() -> None:
    groups = llama_groups(layers=4, ffn=200)
    scores = random_scores(groups, heavy=True)
    for i, value in enumerate((1.0, 2.0, 4.0, 8.0)):
        scores.by_group[f"model.layers.{i}.mlp:ffn"] *= value
    plan = select(groups, scores, 0.3, allocation="global", roles="ffn")
    widths = list(plan.details["widths"]["ffn"].values())
    assert widths == sorted(widths)
    assert widths[0] < widths[-1]


def test_a_head_that_does_nothing_goes_before_any_live_channel() -> None:
    scores = Scores(dict(SMOLLM2_SCORES), "random")
    scores.by_group["model.layers.7.self_attn:kv_heads"] = torch.tensor([[1.0, 0.0, 1.0]])
    plan = select(SMOLLM2, scores, 0.003, allocation="global")
    assert plan["model.layers.7.self_attn:kv_heads"].kept == ((0, 2),)


@pytest.mark.parametrize("count_embeddings", [True, False])
@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
def test_the_ratio_is_reached_within_one_unit(ratio: float, count_embeddings: bool) -> None:
    plan = select(SMOLLM2, SMOLLM2_SCORES, ratio, allocation="global", count_embeddings=count_embeddings, min_keep=1)
    achieved = plan.details["achieved"]["with_embeddings" if count_embeddings else "without_embeddings"]
    largest = max(SMOLLM2.parameters_per_unit(g) for g in SMOLLM2.prunable(["kv_heads", "ffn"]))
    assert abs(achieved["before"] * (1 - ratio) - achieved["after"]) <= largest / 2 + 1


def test_one_head_and_a_tenth_of_the_channels_stay_in_every_layer() -> None:
    scores = Scores(dict(SMOLLM2_SCORES), "random")
    for i in range(10):  # ten layers that seem worthless
        for name in (f"model.layers.{i}.self_attn:kv_heads", f"model.layers.{i}.mlp:ffn"):
            scores.by_group[name] = scores.by_group[name] * 1e-9
    plan = select(SMOLLM2, scores, 0.3, allocation="global")
    widths = plan.details["widths"]
    assert [widths["kv_heads"][str(i)] for i in range(10)] == [1] * 10
    assert [widths["ffn"][str(i)] for i in range(10)] == [154] * 10


def test_min_keep_moves_the_floor() -> None:
    scores = Scores(dict(SMOLLM2_SCORES), "random")
    scores.by_group["model.layers.0.mlp:ffn"] = scores.by_group["model.layers.0.mlp:ffn"] * 1e-9
    plan = select(SMOLLM2, scores, 0.2, allocation="global", min_keep={"ffn": 500, "kv_heads": 0.6})
    assert plan.details["widths"]["ffn"]["0"] == 500
    heads = plan.details["widths"]["kv_heads"]
    assert min(heads.values() if isinstance(heads, dict) else [heads]) == 2


@settings(max_examples=40, deadline=None)
@given(ratio=st.floats(0.02, 0.5), seed=st.integers(0, 99), queries=st.integers(1, 3))
def test_widths_equal_removing_units_one_by_one(ratio: float, seed: int, queries: int) -> None:
    groups = llama_groups(layers=3, hidden=8, kv=3, queries=queries, head_dim=2, ffn=20, vocab=3)
    cut = groups.prunable(["kv_heads", "ffn"])
    scores = random_scores(groups, seed, heavy=True)
    counts = Accounting(groups, cut, {})
    target = groups.num_parameters() - round(ratio * groups.num_parameters())
    values = comparable(cut, {k: v.double().numpy() for k, v in scores.items()}, {g.name: counts.cost(g) for g in cut})
    floors = {"kv_heads": 1, "ffn": 2}
    items = sorted((v, g.name) for g, vs in zip(cut, values, strict=True) for v in vs[: g.units - floors[g.role]])
    widths = {g.name: g.units for g in cut}
    left = [name for _, name in items]
    while left and counts.count({**widths, left[0]: widths[left[0]] - 1}) >= target:
        widths[left.pop(0)] -= 1
    ways = [dict(widths), {**widths, **({left[0]: widths[left[0]] - 1} if left else {})}]
    for name in (n for n in left if groups[n].role == "ffn"):  # what is left goes in channels
        widths[name] -= 1
        ways.insert(-1, dict(widths))
    nearer = min(ways, key=lambda w: abs(counts.count(w) - target))
    if counts.count({g.name: floors[g.role] for g in cut}) > target:
        return
    plan = select(groups, scores, ratio, allocation="global")
    assert {c.group.name: c.width for c in plan.cuts} == {k: w for k, w in nearer.items() if w < groups[k].units}


@settings(max_examples=30, deadline=None)
@given(low=st.floats(0.01, 0.3), high=st.floats(0.01, 0.3), seed=st.integers(0, 9))
def test_a_larger_ratio_keeps_a_subset(low: float, high: float, seed: int) -> None:
    """Of one role: with heads, a ratio that has no room for the next one takes channels in its place."""
    groups = llama_groups(layers=3, ffn=30, vocab=4, kv=3)
    scores = random_scores(groups, seed)
    less, more = (select(groups, scores, r, allocation="global", roles="ffn") for r in sorted((low, high)))
    kept = {c.group.name: set(c.kept[0]) for c in more.cuts}
    for cut in less.cuts:
        assert kept.get(cut.group.name, set()) <= set(cut.kept[0])
        assert cut.group.name in kept


def test_dead_ties_spread_over_layers_and_repeat() -> None:
    groups = llama_groups(layers=4, ffn=40)
    dead = Scores({g.name: torch.zeros(g.outer, g.units) for g in groups}, "random")
    plans = [select(groups, dead, 0.2, allocation="global", roles="ffn") for _ in range(2)]
    assert plans[0].to_json() == plans[1].to_json()
    widths = plans[0].details["widths"]["ffn"]
    widths = list(widths.values()) if isinstance(widths, dict) else [widths]
    assert max(widths) - min(widths) <= 1
    assert plans[0].cuts[0].kept[0] == tuple(range(plans[0].cuts[0].width))


def test_negative_scores_are_ranked_too() -> None:
    groups = llama_groups(layers=3, ffn=40, kv=4)
    scores = random_scores(groups)  # normal: half of them below zero
    shifted = Scores({k: v - 100 if k.endswith("ffn") else v for k, v in scores.items()}, "random")
    plan, same = (select(groups, s, 0.3, allocation="global") for s in (scores, shifted))
    assert removed(plan, "ffn") > 0
    assert removed(plan, "kv_heads") > 0
    assert [c.width for c in plan.cuts] == pytest.approx([c.width for c in same.cuts], abs=1)


def test_query_heads_and_kv_heads_keep_equal_numbers_in_every_copy() -> None:
    groups = llama_groups(layers=3, kv=4, queries=4, ffn=16)
    plan = select(groups, random_scores(groups, heavy=True), 0.4, allocation="global", roles="kv_heads,query_heads,ffn")
    query = [c for c in plan.cuts if c.group.role == "query_heads"]
    assert query
    for cut in query:
        assert len(cut.kept) == 4
        assert {len(row) for row in cut.kept} == {cut.width}


def test_widths_are_means_over_layers_and_the_number_of_units_is_met() -> None:
    plan = select(SMOLLM2, SMOLLM2_SCORES, widths={"ffn": 1024, "kv_heads": 2}, allocation="global")
    widths = plan.details["widths"]
    assert len(set(widths["ffn"].values())) > 1
    assert sum(widths["ffn"].values()) == 1024 * 30
    assert sum(widths["kv_heads"].values()) == 2 * 30


def test_rounding_keeps_multiples_and_comes_within_one_block() -> None:
    plan = select(SMOLLM2, SMOLLM2_SCORES, 0.25, allocation="global", round_to=64, count_embeddings=False)
    assert all(w % 64 == 0 for w in plan.details["widths"]["ffn"].values())
    achieved = plan.details["achieved"]["without_embeddings"]
    assert abs(achieved["before"] * 0.75 - achieved["after"]) <= 294912 / 2


def test_a_group_stands_between_the_mean_of_its_role_and_its_own() -> None:
    """The mean value of a group is sqrt(D_group / D_role): 1 where the group is like its role."""
    cut = SMOLLM2.prunable(["kv_heads", "ffn"])
    cost = {g.name: SMOLLM2.parameters_per_unit(g) for g in cut}
    scores = {k: v.double().numpy() for k, v in SMOLLM2_SCORES.items()}
    for g, values in zip(cut, comparable(cut, scores, cost), strict=True):
        role_mean = np.concatenate([scores[h.name][0] for h in cut if h.role == g.role]).mean()
        assert values.mean() == pytest.approx(np.sqrt(scores[g.name].mean() / role_mean))
        assert (np.diff(values) >= 0).all()


@settings(max_examples=40, deadline=None)
@given(ratio=st.floats(0.05, 0.4), seed=st.integers(0, 99), allocation=st.sampled_from(["global", "knapsack"]))
def test_the_ratio_is_met_to_within_a_channel_where_channels_are_left(ratio: float, seed: int, allocation: str) -> None:
    groups = llama_groups(layers=3, hidden=16, kv=4, head_dim=8, ffn=60, vocab=3)
    scores = random_scores(groups, seed, heavy=True)
    plan = select(groups, scores, ratio, allocation=allocation)
    left = {c.group.name: c.width for c in plan.cuts}
    if all(left.get(g.name, g.units) > 6 for g in groups.prunable(["ffn"])):
        achieved = plan.details["achieved"]["with_embeddings"]
        missed = achieved["after"] - (1 - ratio) * achieved["before"]
        assert abs(missed) <= 3 * 16 / 2 + 1
