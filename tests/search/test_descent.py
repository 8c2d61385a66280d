"""Allocation ``descent``: the best plain allocation, bettered along slopes that are measured around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from helpers_families import build
from helpers_llama import tiny_llama
from helpers_mixtures import mixture
from helpers_search import ids, make
from helpers_selection import llama_groups

import pyprune
from pyprune import apply, measure_budget, select
from pyprune.errors import PyPruneError
from pyprune.search import search_plan
from pyprune.search.curves import BROKEN
from pyprune.search.descent import REACH, ROUNDS, descend, neighbours, prices_around
from pyprune.search.fitness import Fitness
from pyprune.search.moves import Moves
from pyprune.selection.accounting import Accounting
from pyprune.selection.allocation import Budget, Limits

UNITS = 100


def moves(share: float = 0.7, limits: Limits | None = None) -> Moves:
    """Three groups of channels alike, of which ``share`` stays."""
    groups = llama_groups(layers=3, ffn=UNITS)
    cut = groups.prunable(["ffn"])
    counts = Accounting(groups, cut, {})
    cost = {g.name: counts.cost(g) for g in cut}
    target = counts.count({}) - round((1 - share) * 3 * UNITS) * cost[cut[0].name]
    return Moves(cut, Budget(target, counts.count, {g.name: limits or Limits(UNITS, 10) for g in cut}, cost))


class Bowl:
    """Divergence a_g (units gone)^2, added over groups; ``wall``: infinite as soon as a width leaves the start."""

    def __init__(self, weights: Mapping[str, float], wall: bool = False) -> None:
        self.weights, self.wall = weights, wall
        self.steps, self.tokens = [None, None], [1, 1]
        self.asked: list[dict[str, int]] = []
        self.anchors: list[dict[str, int]] = []

    def total(self, widths: Mapping[str, int], first: int, last: int) -> float:
        self.asked.append(dict(widths))
        far = sum(abs(w - self.anchors[-1][n]) > 0 for n, w in widths.items()) > 1
        if self.wall and far:
            return float("nan")
        return (last - first) * sum(self.weights[n] * (UNITS - w) ** 2 for n, w in widths.items())

    def rebase(self, widths: Mapping[str, int]) -> None:
        pass

    def anchor(self, widths: Mapping[str, int]) -> bool:
        self.anchors.append(dict(widths))
        return True


def even(where: Moves) -> dict[str, int]:
    return {g.name: 70 for g in where.groups}


def test_widths_go_to_where_slopes_are_equal() -> None:
    where = moves()
    names = [g.name for g in where.groups]
    bowl = Bowl(dict(zip(names, (1.0, 1.25, 1.5), strict=True)))
    found, report = descend(where, bowl, {"even": even(where)}, even(where))
    gone = np.array([UNITS - found[n] for n in names])
    want = 90 * np.array([1.0, 0.8, 2 / 3]) / (1 + 0.8 + 2 / 3)  # a_g gone_g the same for all, 90 gone in all
    assert gone.sum() == 90
    assert np.abs(gone - want).max() < 1  # a sum of parabolas is what a round takes the divergence for
    assert report["divergence"] < report["rounds"][0]["divergence"]


def test_no_width_moves_further_than_a_round_reaches_and_none_below_the_least() -> None:
    where = moves(limits=Limits(UNITS, 65))
    names = [g.name for g in where.groups]
    found, report = descend(
        where, Bowl(dict(zip(names, (1.0, 9.0, 9.0), strict=True))), {"even": even(where)}, even(where)
    )
    assert found[names[0]] == 65 and where.fits(found)
    where = moves()
    found, report = descend(
        where, Bowl(dict(zip(names, (0.01, 9.0, 9.0), strict=True))), {"even": even(where)}, even(where)
    )
    assert 70 - found[names[0]] <= ROUNDS * REACH * UNITS
    assert len(report["rounds"]) == 1 + ROUNDS


def test_it_starts_from_the_best_seed_and_ends_where_nothing_is_better() -> None:
    where = moves()
    names = [g.name for g in where.groups]
    bowl = Bowl(dict.fromkeys(names, 1.0))
    uneven = dict(zip(names, (60, 70, 80), strict=True))
    found, report = descend(where, bowl, {"uneven": uneven, "even": even(where)}, uneven)
    assert report["seeds"]["even"] < report["seeds"]["uneven"]
    assert found == even(where) and report["divergence"] == report["rounds"][0]["divergence"]


def test_a_step_that_breaks_the_model_is_not_taken() -> None:
    where = moves()
    names = [g.name for g in where.groups]
    bowl = Bowl(dict(zip(names, (1.0, 2.0, 3.0), strict=True)), wall=True)
    found, report = descend(where, bowl, {"even": even(where)}, even(where))
    assert found == even(where) and np.isfinite(report["divergence"]) and len(report["rounds"]) == 1


def test_what_is_worse_when_measured_exactly_is_taken_back() -> None:
    where = moves()
    names = [g.name for g in where.groups]

    class Deceived(Bowl):
        def total(self, widths: Mapping[str, int], first: int, last: int) -> float:
            worse = 10 if self.anchors[-1] != even(where) else 1
            return worse * super().total(widths, first, last)

    bowl = Deceived(dict(zip(names, (1.0, 2.0, 3.0), strict=True)))
    found, report = descend(where, bowl, {"even": even(where)}, even(where))
    assert found == even(where) and len(report["rounds"]) == 1


def test_neighbours_are_allowed_widths_on_both_sides() -> None:
    where = moves(limits=Limits(UNITS, 10, 8))
    group = where.groups[0]
    assert neighbours(where, group, 72) == [80, 64]
    assert neighbours(where, group, UNITS) == [88]
    assert neighbours(where, group, 16) == [24]


def test_prices_are_the_measured_slopes_and_close_the_ways_out() -> None:
    parabola = [(8, -0.4), (4, 0.6)]  # 0.25 u + 0.025 u^2
    prices = prices_around(10, 6, parabola)
    assert prices == pytest.approx([-BROKEN] * 2 + [0.175, 0.225, 0.275, 0.325] + [BROKEN] * 4)
    assert prices[2:4].sum() == pytest.approx(0.4) and prices[4:6].sum() == pytest.approx(0.6)
    downwards = prices_around(10, 6, [(8, -0.6), (4, 0.4)])
    assert downwards == pytest.approx([-BROKEN] * 2 + [0.25] * 4 + [BROKEN] * 4)
    assert prices_around(10, 10, [(8, 0.6)]) == pytest.approx([0.3] * 2 + [BROKEN] * 8)
    assert prices_around(10, 4, [(6, -0.6)]) == pytest.approx([-BROKEN] * 4 + [0.3] * 2 + [BROKEN] * 4)
    assert (prices_around(10, 10, []) == BROKEN).all()


@pytest.mark.parametrize("compensation", ["none", "least-squares"])
def test_it_ends_nearer_to_the_dense_model_than_what_it_starts_from(compensation: str) -> None:
    torch.manual_seed(0)
    case = make(tiny_llama(intermediate_size=64, num_hidden_layers=4), roles=("ffn",))
    options: dict[str, Any] = {"roles": ["ffn"], "allocation": "descent", "compensation": compensation}
    plan = search_plan(case.model, case.groups, case.scores, ids(32), 0.25, **options)
    found = plan.details["descent"]
    values = [r["divergence"] for r in found["rounds"]]
    assert values == sorted(values, reverse=True) and len(values) > 1 and found["divergence"] == values[-1]
    if compensation == "none":
        x = ids(32, seed=77)
        with torch.no_grad():

            def divergence(p: Any) -> float:
                dense, cut = (m(x).logits.log_softmax(-1) for m in (case.model, apply(case.model, p, copy=True)))
                return float((dense.exp() * (dense - cut)).sum(-1).mean())

            plain = [
                divergence(select(case.groups, case.scores, 0.25, roles=["ffn"], allocation=a))
                for a in ("uniform", "log_depth")
            ]
            assert divergence(plan) < min(plain)


def test_the_budget_is_met_in_its_unit_and_the_weights_stay() -> None:
    case = make(tiny_llama(intermediate_size=96), roles=("ffn",))
    before = [p.clone() for p in case.model.parameters()]
    macs = measure_budget(case.model, case.groups, "macs")
    for budget in ("parameters", macs):
        plan = search_plan(
            case.model, case.groups, case.scores, ids(), 0.3, roles=["ffn"], allocation="descent", budget=budget
        )
        spent = plan.details["budget"] or plan.details["achieved"]["with_embeddings"]
        assert abs(spent["after"] - 0.7 * spent["before"]) <= 3 * 32
    assert all(torch.equal(a, b) for a, b in zip(before, case.model.parameters(), strict=True))


@pytest.mark.parametrize("family", ["GPT-2", "Mixtral", "heads"])
def test_other_families_and_roles_are_measured(family: str, tmp_path: Any) -> None:
    if family == "heads":
        model, roles = tiny_llama(num_hidden_layers=4), ("kv_heads", "ffn")
    else:
        model = mixture("mixtral") if family == "Mixtral" else build(family, tmp_path)
        roles = ("expert_ffn",) if family == "Mixtral" else ("kv_heads", "ffn")
    case = make(model, roles=roles, vocabulary=97)
    plan = search_plan(case.model, case.groups, case.scores, ids(), 0.15, roles=roles, allocation="descent")
    assert plan.cuts and plan.details["allocation"] == "descent"
    assert plan.details["achieved"]["with_embeddings"]["ratio"] == pytest.approx(0.15, abs=0.03)


def test_the_whole_line_measures_and_repeats() -> None:
    options: dict[str, Any] = {
        "ratio": 0.2, "calibration": ids(16), "criterion": "wanda", "allocation": "descent", "roles": "ffn",
        "compensation": "least-squares",
    }  # fmt: skip
    one, two = (pyprune.prune(tiny_llama(), **options) for _ in range(2))
    assert one.plan.cuts == two.plan.cuts
    assert "measure widths" in [s["name"] for s in one.report.stages]
    found = one.report.plan["descent"]
    assert found["held_out_tokens"] == 4 * 16 and found["compensation"] == "least-squares"


@pytest.mark.parametrize(
    ("options", "option"),
    [({"search_minutes": 3}, "search_minutes"), ({"iterative_steps": 2}, "iterative_steps"),
     ({"calibration": None, "criterion": "l2"}, "calibration"), ({"calibration": ids(3)}, "samples"),
     ({"roles": "hidden"}, "roles")],
)  # fmt: skip
def test_mistakes_are_named(options: dict[str, Any], option: str) -> None:
    given: dict[str, Any] = {
        "ratio": 0.2, "calibration": ids(16), "criterion": "wanda", "allocation": "descent", **options
    }  # fmt: skip
    with pytest.raises(PyPruneError) as error:
        pyprune.prune(tiny_llama(), **given)
    assert error.value.option == option


def test_a_killed_descent_goes_on_and_the_same_again_measures_nothing(tmp_path: Any, monkeypatch: Any) -> None:
    case = make(tiny_llama(intermediate_size=64), roles=("ffn",))

    def run(folder: Any) -> Any:
        return search_plan(
            case.model, case.groups, case.scores, ids(), 0.25, roles=["ffn"], allocation="descent", cache=folder
        )

    real, asked, limit = Fitness.total, [], [10**6]

    def counted(self: Fitness, *args: Any) -> float:
        if len(asked) == limit[0]:
            raise KeyboardInterrupt
        asked.append(args)
        return real(self, *args)

    monkeypatch.setattr(Fitness, "total", counted)
    want = run(None)
    whole = len(asked)
    limit[0] = whole + 12  # in the middle of the first round
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cache")
    limit[0], before = 10**6, len(asked)
    resumed = run(tmp_path / "cache")
    assert resumed.cuts == want.cuts and 0 < len(asked) - before <= whole - 12
    assert resumed.details["descent"]["divergence"] == pytest.approx(want.details["descent"]["divergence"], rel=1e-6)
    before = len(asked)
    assert run(tmp_path / "cache").cuts == want.cuts and len(asked) == before
    (file,) = (tmp_path / "cache").glob("measured-*.json")
    file.write_text("{}")
    assert run(tmp_path / "cache").cuts == want.cuts and len(asked) > before


def test_a_cache_is_not_taken_for_another_request(tmp_path: Any) -> None:
    case = make(tiny_llama(intermediate_size=64), roles=("ffn",))
    for number, (ratio, seed) in enumerate([(0.25, 0), (0.2, 0), (0.25, 5)], start=1):
        search_plan(
            case.model, case.groups, case.scores, ids(seed=seed), ratio, roles=["ffn"], allocation="descent",
            cache=tmp_path,
        )  # fmt: skip
        assert len(list(tmp_path.glob("measured-*.json"))) == number
