"""Allocations that give layers different widths: ``knapsack``, ``log_depth`` and ``linear_depth``."""

from __future__ import annotations

import itertools
from math import log

import numpy as np
import pytest
import torch
from helpers_selection import llama_groups, random_scores, smollm2_groups

from pyprune.errors import PyPruneError
from pyprune.importance.scores import Scores
from pyprune.selection import select
from pyprune.selection.knapsack import GROWTH

SMOLLM2 = smollm2_groups()
SMOLLM2_SCORES = random_scores(SMOLLM2, heavy=True)


def widths(plan, groups, role: str = "ffn") -> list[int]:
    cut = {c.group.name: c.width for c in plan.cuts}
    return [cut.get(g.name, g.units) for g in groups if g.role == role]


def test_knapsack_finds_the_least_total_loss_of_all_widths() -> None:
    groups = llama_groups(layers=3, ffn=6)
    generator = torch.Generator().manual_seed(4)
    scores = Scores(
        {g.name: torch.rand(g.outer, g.units, generator=generator) * (1 + (g.layer or 0)) for g in groups}, "x"
    )
    plan = select(groups, scores, widths={"ffn": 0.5}, allocation="knapsack", min_keep={"ffn": 1})
    ours = widths(plan, groups)
    assert sum(ours) == 9
    lowest = [np.sort(scores[g.name][0].numpy()) for g in groups if g.role == "ffn"]
    costs = {
        w: sum(float(c[: 6 - k].sum()) ** GROWTH for c, k in zip(lowest, w, strict=True))
        for w in itertools.product(range(1, 7), repeat=3)
        if sum(w) == 9
    }
    assert costs[tuple(ours)] == pytest.approx(min(costs.values()), rel=1e-5)


def test_knapsack_takes_from_layers_whose_units_cost_less() -> None:
    scores = Scores({k: v * (1 + i) for i, (k, v) in enumerate(SMOLLM2_SCORES.items())}, "x")
    found = widths(select(SMOLLM2, scores, 0.2, roles="ffn", allocation="knapsack"), SMOLLM2)
    assert found[0] < found[10] < found[-1]


@pytest.mark.parametrize("allocation", ["knapsack", "log_depth", "linear_depth"])
@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.5])
def test_the_size_is_met(allocation: str, ratio: float) -> None:
    plan = select(SMOLLM2, SMOLLM2_SCORES, ratio, allocation=allocation, count_embeddings=False)
    assert plan.details["achieved"]["without_embeddings"]["ratio"] == pytest.approx(ratio, abs=0.002)


def test_log_depth_removes_in_proportion_to_the_logarithm_of_the_layer() -> None:
    found = widths(select(SMOLLM2, SMOLLM2_SCORES, 0.2, roles="ffn", allocation="log_depth"), SMOLLM2)
    shares = [(1536 - w) / (0.25 + 0.75 * log(1 + i) / log(30)) for i, w in enumerate(found)]
    assert max(shares) == pytest.approx(min(shares), rel=0.02)


def test_linear_depth_removes_in_proportion_to_the_layer() -> None:
    found = widths(select(SMOLLM2, SMOLLM2_SCORES, 0.2, roles="ffn", allocation="linear_depth"), SMOLLM2)
    shares = [(1536 - w) / (0.25 + 0.75 * i / 29) for i, w in enumerate(found)]
    assert max(shares) == pytest.approx(min(shares), rel=0.02)


@pytest.mark.parametrize("allocation", ["log_depth", "linear_depth"])
def test_heads_go_late_and_neither_in_the_first_quarter_nor_in_the_last_layers(allocation: str) -> None:
    found = {}
    for ratio in (0.2, 0.5, 0.7):
        plan = select(SMOLLM2, SMOLLM2_SCORES, ratio, allocation=allocation, count_embeddings=False)
        found[ratio] = widths(plan, SMOLLM2, "kv_heads")
    assert found[0.2] == [3] * 30
    assert found[0.5] == [3] * 8 + [2] * 20 + [3] * 2
    assert found[0.7][:8] == [3] * 8 and set(found[0.7][8:28]) < {1, 2} and found[0.7][28:] == [3] * 2


def test_heads_alone_are_spread_by_the_schedule() -> None:
    plan = select(SMOLLM2, SMOLLM2_SCORES, 0.1, roles="kv_heads", allocation="log_depth", count_embeddings=False)
    heads = widths(plan, SMOLLM2, "kv_heads")
    assert heads == sorted(heads, reverse=True) and heads[0] > heads[-1]


def test_layers_that_cannot_lose_more_leave_it_to_the_others() -> None:
    plan = select(SMOLLM2, SMOLLM2_SCORES, 0.5, roles="ffn", allocation="log_depth", min_keep={"ffn": 500},
                  count_embeddings=False)  # fmt: skip
    found = widths(plan, SMOLLM2)
    assert found[-1] == 500 and found[0] > 500
    assert plan.details["achieved"]["without_embeddings"]["ratio"] == pytest.approx(0.5, abs=0.002)


@pytest.mark.parametrize("allocation", ["knapsack", "log_depth", "global"])
def test_widths_keep_to_the_multiples_that_were_asked(allocation: str) -> None:
    found = widths(select(SMOLLM2, SMOLLM2_SCORES, 0.3, roles="ffn", allocation=allocation, round_to=64), SMOLLM2)
    assert all(w % 64 == 0 for w in found) and len(set(found)) > 1


def test_scores_for_the_allocation_say_how_many_and_the_others_which() -> None:
    groups = llama_groups(layers=2, ffn=10)
    which = Scores({g.name: torch.arange(g.units).float().expand(g.outer, -1) for g in groups}, "which")
    many = Scores({g.name: torch.ones(g.outer, g.units) * (1 if g.layer == 0 else 100) for g in groups}, "many")
    plan = select(groups, which, widths={"ffn": 0.6}, allocation="knapsack", allocation_scores=many)
    assert widths(plan, groups) == [2, 10]
    assert plan["model.layers.0.mlp:ffn"].kept == ((8, 9),)
    assert (plan.details["criterion"], plan.details["allocation_criterion"]) == ("which", "many")


def test_scores_for_the_allocation_are_checked_too() -> None:
    groups = llama_groups(layers=2, ffn=10)
    fine = random_scores(groups)
    with pytest.raises(PyPruneError, match="no scores for"):
        select(groups, fine, 0.1, roles="ffn", allocation="knapsack", allocation_scores=Scores({}, "x"))
