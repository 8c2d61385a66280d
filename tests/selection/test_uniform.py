"""Allocation ``uniform``: one fraction everywhere, the size met within one unit a layer."""

from __future__ import annotations

import pytest
import torch
from helpers_selection import llama_groups, random_scores, smollm2_groups
from hypothesis import given, settings
from hypothesis import strategies as st

from pyprune.discovery.groups import Groups
from pyprune.selection import select
from pyprune.selection.accounting import Accounting

SMOLLM2 = smollm2_groups()
SMOLLM2_SCORES = random_scores(SMOLLM2, heavy=True)


def step(groups: Groups, role: str, count_embeddings: bool) -> int:
    """Parameters of one unit in every group of ``role``."""
    cut = groups.prunable([role])
    counts = Accounting(groups, cut, {}, count_embeddings)
    return sum(counts.cost(g) for g in cut)


@pytest.mark.parametrize("count_embeddings", [True, False])
@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
def test_the_ratio_is_reached_within_one_channel_a_layer(ratio: float, count_embeddings: bool) -> None:
    plan = select(SMOLLM2, SMOLLM2_SCORES, ratio, count_embeddings=count_embeddings)
    achieved = plan.details["achieved"]["with_embeddings" if count_embeddings else "without_embeddings"]
    assert abs(achieved["before"] * (1 - ratio) - achieved["after"]) <= step(SMOLLM2, "ffn", count_embeddings) / 2 + 1


def test_a_fifth_of_smollm2_without_embeddings_is_410_channels_and_no_head() -> None:
    plan = select(SMOLLM2, SMOLLM2_SCORES, 0.2, count_embeddings=False)
    assert plan.details["widths"] == {"kv_heads": 3, "ffn": 1126}
    assert plan.details["achieved"]["without_embeddings"]["ratio"] == pytest.approx(0.2, abs=2.5e-4)
    assert {c.group.role for c in plan.cuts} == {"ffn"}


def test_half_of_smollm2_takes_one_of_three_heads() -> None:
    plan = select(SMOLLM2, SMOLLM2_SCORES, 0.5, count_embeddings=False)
    assert plan.details["widths"] == {"kv_heads": 2, "ffn": 682}


def test_every_layer_keeps_the_same_widths() -> None:
    groups = llama_groups(layers=5, kv=4, queries=3, ffn=40, head_dim=8, hidden=24)
    roles = ["kv_heads", "query_heads", "vo_dim", "qk_dim", "ffn", "hidden"]
    plan = select(groups, random_scores(groups), 0.45, roles=roles)
    assert all(isinstance(width, int) for width in plan.details["widths"].values())


@settings(max_examples=60, deadline=None)
@given(
    kv=st.integers(1, 5),
    queries=st.integers(1, 3),
    ffn=st.integers(8, 40),
    layers=st.integers(1, 4),
    ratio=st.floats(0.02, 0.6),
    seed=st.integers(0, 99),
)
def test_heads_lose_at_most_the_fraction_that_channels_lose(
    kv: int, queries: int, ffn: int, layers: int, ratio: float, seed: int
) -> None:
    """Brute force over all pairs of widths: heads are rounded towards keeping, channels take up the difference."""
    groups = llama_groups(layers=layers, hidden=8, kv=kv, queries=queries, head_dim=2, ffn=ffn, vocab=2)
    counts = Accounting(groups, groups.prunable(["kv_heads", "ffn"]), {})

    def left(heads: int, channels: int) -> int:
        widths = {"kv_heads": heads, "ffn": channels}
        return counts.count({g.name: widths[g.role] for g in groups.prunable(["kv_heads", "ffn"])})

    target = groups.num_parameters() - round(ratio * groups.num_parameters())
    if left(1, 1) > target:
        return
    plan = select(groups, random_scores(groups, seed), ratio)
    heads, channels = plan.details["widths"]["kv_heads"], plan.details["widths"]["ffn"]
    best = min(range(1, ffn + 1), key=lambda c: (abs(left(heads, c) - target), -c))
    assert channels == best
    if heads == kv or left(heads + 1, 1) <= target:  # else channels alone could not have taken it up
        assert kv - heads <= kv * (ffn - channels + 1) / ffn
    if heads > 1 and left(heads - 1, ffn) >= target:  # one head more would have been more than its fraction
        fewer = min(range(1, ffn + 1), key=lambda c: abs(left(heads - 1, c) - target))
        assert kv - heads + 1 >= kv * (ffn - fewer - 1) / ffn


def test_where_channels_cannot_take_up_the_difference_a_head_goes() -> None:
    groups = llama_groups(layers=2, hidden=16, kv=2, queries=2, head_dim=8, ffn=24, vocab=2)
    only_channels = 23 * 3 * 16 * 2 / groups.num_parameters()
    plan = select(groups, random_scores(groups), only_channels + 0.04)
    assert plan.details["widths"]["kv_heads"] == 1
    achieved = plan.details["achieved"]["with_embeddings"]
    assert abs(achieved["ratio"] - only_channels - 0.04) <= step(groups, "ffn", True) / 2 / achieved["before"]


def test_the_nearer_of_two_sizes_is_taken_where_neither_meets_the_ratio() -> None:
    groups = llama_groups(layers=1, hidden=16, kv=2, queries=2, head_dim=8, ffn=3, vocab=2)
    scores = random_scores(groups)
    assert select(groups, scores, 0.15).details["widths"] == {"kv_heads": 2, "ffn": 1}
    plan = select(groups, scores, 0.4)
    assert plan.details["widths"] == {"kv_heads": 1, "ffn": 3}
    assert plan.details["achieved"]["with_embeddings"]["ratio"] == pytest.approx(0.4364, abs=1e-4)
    assert plan.details["notes"] == ["ratio 0.4 was asked; the nearest that this way of cutting reaches is 0.4363."]


@settings(max_examples=40, deadline=None)
@given(low=st.floats(0.01, 0.6), high=st.floats(0.01, 0.6), seed=st.integers(0, 9))
def test_a_larger_ratio_keeps_a_subset_of_the_channels(low: float, high: float, seed: int) -> None:
    groups = llama_groups(layers=3, ffn=30, vocab=4)
    scores = random_scores(groups, seed)
    less, more = (select(groups, scores, r, roles="ffn") for r in sorted((low, high)))
    kept = {c.group.name: set(c.kept[0]) for c in less.cuts}
    for cut in more.cuts:
        assert set(cut.kept[0]) <= kept.get(cut.group.name, set(range(30)))


def test_a_larger_ratio_never_brings_a_head_back() -> None:
    groups = llama_groups(layers=2, kv=6, ffn=60)
    scores = random_scores(groups)
    kept = set(range(6))
    for percent in range(2, 70, 2):
        cuts = {c.group.name: c for c in select(groups, scores, percent / 100).cuts}
        cut = cuts.get("model.layers.0.self_attn:kv_heads")
        now = set(cut.kept[0]) if cut else set(range(6))
        assert now <= kept
        kept = now
    assert len(kept) < 6


def test_layers_of_different_widths_lose_the_same_fraction() -> None:
    groups = llama_groups(layers=3, ffn=[40, 80, 160], hidden=8)
    plan = select(groups, random_scores(groups), widths={"ffn": 0.5})
    assert plan.details["widths"]["ffn"] == {"0": 20, "1": 40, "2": 80}
    plan = select(groups, random_scores(groups), 0.3, roles="ffn")
    a, b, c = plan.details["widths"]["ffn"].values()
    assert (b, c) == (pytest.approx(2 * a, abs=1), pytest.approx(4 * a, abs=2))


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.4])
def test_rounded_widths_come_as_near_as_a_multiple_can(ratio: float) -> None:
    plan = select(SMOLLM2, SMOLLM2_SCORES, ratio, round_to=128, roles="ffn", count_embeddings=False)
    width = plan.details["widths"]["ffn"]
    assert width % 128 == 0
    exact = select(SMOLLM2, SMOLLM2_SCORES, ratio, roles="ffn", count_embeddings=False).details["widths"]["ffn"]
    assert abs(width - exact) <= 64
    assert "multiples of 128" in plan.details["notes"][0]


def test_whole_layers_go_first_and_channels_make_up_the_rest() -> None:
    groups = llama_groups(layers=10, kv=2, hidden=32, ffn=96, vocab=4)
    plan = select(groups, random_scores(groups), 0.25, roles=["layers", "ffn"])
    achieved = plan.details["achieved"]["with_embeddings"]
    assert achieved["ratio"] == pytest.approx(0.25, abs=step(groups, "ffn", True) / achieved["before"])
    assert 7 <= plan.details["widths"]["layers"] <= 9
    removed = plan.removed_modules()
    assert removed
    assert not [c for c in plan.cuts if c.group.module.startswith(tuple(m + "." for m in removed))]


def test_scores_decide_which_units_stay() -> None:
    groups = llama_groups(layers=1, ffn=6)
    scores = random_scores(groups)
    scores.by_group["model.layers.0.mlp:ffn"] = torch.tensor([[5.0, 1, 4, 2, 6, 3]])
    plan = select(groups, scores, widths={"ffn": 3})
    assert plan["model.layers.0.mlp:ffn"].kept == ((0, 2, 4),)
