"""Allocation ``divergence``: widths from what each group alone, at several widths, costs at the model's output."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from helpers_llama import tiny_llama
from helpers_search import divergence, ids, make
from helpers_selection import llama_groups

import pyprune
from pyprune import apply, discover, select
from pyprune.search import search_plan
from pyprune.search.curves import BROKEN, allocate_by_curves, levels, unit_prices
from pyprune.selection.accounting import Accounting
from pyprune.selection.allocation import Budget, Limits


@pytest.mark.parametrize(
    ("units", "limits", "wanted"),
    [
        (24, Limits(24, 3), [20, 17, 14, 10, 6, 3]),
        (3, Limits(3, 1), [2, 1]),
        (1, Limits(1, 1), []),
        (24, Limits(24, 1, 8), [16, 8]),
    ],
)
def test_widths_are_measured_down_to_the_least_and_no_forbidden_ones(
    units: int, limits: Limits, wanted: list[int]
) -> None:
    assert levels(units, limits) == wanted


def test_prices_follow_the_lower_hull_of_what_was_measured() -> None:
    prices = unit_prices(10, [(8, 0.2), (6, 0.9), (4, 1.0), (2, 3.0)])
    assert prices[:8] == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.2, 0.2, 1.0, 1.0])
    assert (prices[8:] == BROKEN).all() and (np.diff(prices) >= 0).all()


def test_the_choice_is_the_best_of_all_choices_of_measured_widths() -> None:
    """Convex curves and equal costs, so that the relaxed optimum is a whole one, against every combination."""
    groups = llama_groups(layers=3, ffn=12)
    cut = groups.prunable(["ffn"])
    counts = Accounting(groups, cut, {})
    generator = np.random.default_rng(0)
    limits = {g.name: Limits(12, 2, 2) for g in cut}
    curves = {
        g.name: list(zip([10, 8, 6, 4, 2], np.cumsum(np.sort(generator.random(5))).tolist(), strict=True)) for g in cut
    }
    for gone in (6, 12, 18):
        target = counts.count({}) - gone * counts.cost(cut[0])
        found = allocate_by_curves(
            cut, curves, Budget(target, counts.count, limits, {g.name: counts.cost(g) for g in cut})
        )
        known = {g.name: {12: 0.0, **dict(curves[g.name])} for g in cut}
        every = [
            sum(known[g.name][w] for g, w in zip(cut, widths, strict=True))
            for widths in itertools.product([12, 10, 8, 6, 4, 2], repeat=3)
            if sum(12 - w for w in widths) == gone
        ]
        assert sum(12 - w for w in found.values()) == gone
        assert sum(known[n][w] for n, w in found.items()) == pytest.approx(min(every))


def test_a_curve_holds_the_divergence_of_the_model_with_that_group_alone_cut() -> None:
    model = tiny_llama()
    groups = discover(model)
    scores = pyprune.score(model, groups, ids(8), "wanda", roles=["kv_heads", "ffn"])
    tokens = ids(16)
    plan = search_plan(model, groups, scores, tokens, 0.2, allocation="divergence", compensation="none")
    curves = plan.details["divergence"]["curves"]
    assert set(curves) == {g.name for g in groups.prunable(["kv_heads", "ffn"])}
    screened = tokens[[2, 6, 10, 14]]  # one in four, all in one step
    assert plan.details["divergence"]["held_out_tokens"] == screened.numel()
    for name in ("model.layers.1.mlp:ffn", "model.layers.2.self_attn:kv_heads"):
        for width, kl in curves[name]:
            whole = select(groups, scores, widths={groups[name].role: width})
            masked = tiny_llama()
            with torch.no_grad():
                for tensor, dim, gone in whole[name].removed_positions():
                    masked.get_parameter(tensor).index_fill_(dim, torch.from_numpy(gone), 0.0)
            assert kl == pytest.approx(divergence(model, masked, screened), rel=1e-3, abs=1e-5)


def test_a_layer_that_matters_less_loses_more() -> None:
    model = tiny_llama(intermediate_size=48)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(0.01)
    case = make(model, roles=("ffn",))
    plan = search_plan(model, case.groups, case.scores, ids(16), 0.25, roles=["ffn"], allocation="divergence")
    widths = plan.details["widths"]["ffn"]
    assert widths["1"] < min(widths["0"], widths["2"])


def test_it_ends_nearer_to_the_dense_model_than_equal_widths_on_other_tokens() -> None:
    case = make(tiny_llama(intermediate_size=48, num_hidden_layers=4), roles=("ffn",))
    given: dict[str, Any] = {"roles": ["ffn"]}
    plan = search_plan(
        case.model, case.groups, case.scores, ids(32), 0.25, allocation="divergence", compensation="none", **given
    )
    plain = select(case.groups, case.scores, 0.25, **given)
    x = ids(32, seed=77)
    found = [divergence(case.model, apply(case.model, p, copy=True), x) for p in (plan, plain)]
    assert found[0] < found[1]


def test_the_whole_line_measures_and_repeats() -> None:
    options: dict[str, Any] = {
        "ratio": 0.2, "calibration": ids(16), "criterion": "wanda", "allocation": "divergence",
        "compensation": "least-squares",
    }  # fmt: skip
    one, two = (pyprune.prune(tiny_llama(), **options) for _ in range(2))
    assert one.plan.cuts == two.plan.cuts
    assert "measure widths" in [s["name"] for s in one.report.stages]
    assert one.report.plan["divergence"]["evaluations"] == 3 * (1 + 6)
    fixed = pyprune.prune(tiny_llama(), **{**options, "ratio": 0.25}, widths={"kv_heads": 1}, roles="ffn")
    assert fixed.plan.details["widths"]["kv_heads"] == 1
