"""Allocation ``descent``: the best plain allocation, bettered along slopes that are measured around it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_llama import tiny_llama
from helpers_search import divergence, ids, make
from helpers_selection import llama_groups

import pyprune
from pyprune import apply, select
from pyprune.search import search_plan
from pyprune.search.curves import BROKEN
from pyprune.search.descent import REACH, ROUNDS, descend, neighbours, prices_around
from pyprune.search.fitness import Fitness
from pyprune.search.measurements import Remembered
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


def test_a_round_that_hardly_lowers_the_divergence_is_the_last() -> None:
    where = moves()
    names = [g.name for g in where.groups]

    class Floor(Bowl):
        def total(self, widths: Mapping[str, int], first: int, last: int) -> float:
            return super().total(widths, first, last) + (last - first) * 1e6

    bowl = Floor(dict(zip(names, (0.01, 9.0, 9.0), strict=True)))  # without the floor it takes all rounds (above)
    found, report = descend(where, bowl, {"even": even(where)}, even(where))
    assert found != even(where) and len(report["rounds"]) == 2


def test_it_starts_from_the_best_seed_and_ends_where_nothing_is_better() -> None:
    where = moves()
    names = [g.name for g in where.groups]
    bowl = Bowl(dict.fromkeys(names, 1.0))
    uneven = dict(zip(names, (60, 70, 80), strict=True))
    found, report = descend(where, bowl, {"uneven": uneven, "even": even(where)}, uneven)
    assert report["starts"]["even"] < report["starts"]["uneven"]
    assert found == even(where) and report["divergence"] == report["rounds"][0]["divergence"]


def test_a_step_that_breaks_the_model_is_not_taken() -> None:
    where = moves()
    names = [g.name for g in where.groups]
    bowl = Bowl(dict(zip(names, (1.0, 2.0, 3.0), strict=True)), wall=True)
    found, report = descend(where, bowl, {"even": even(where)}, even(where))
    assert found == even(where) and np.isfinite(report["divergence"]) and len(report["rounds"]) == 1


def test_a_seed_that_breaks_with_refits_of_its_own_gives_way_to_the_next() -> None:
    where = moves()
    names = [g.name for g in where.groups]
    uneven = dict(zip(names, (60, 70, 80), strict=True))

    class Breaks(Bowl):
        def total(self, widths: Mapping[str, int], first: int, last: int) -> float:
            value = super().total(widths, first, last)
            return float("inf") if self.anchors[-1] == even(where) else value

    bowl = Breaks(dict.fromkeys(names, 1.0))
    found, report = descend(where, bowl, {"even": even(where), "uneven": uneven}, uneven)
    assert report["starts"]["even"] < report["starts"]["uneven"] == report["rounds"][0]["divergence"]
    assert where.fits(found) and np.isfinite(report["divergence"])


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
    told = plan.details["descent"]
    values = [r["divergence"] for r in told["rounds"]]
    assert values == sorted(values, reverse=True) and len(values) > 1 and told["divergence"] == values[-1]
    if compensation == "none":
        x = ids(32, seed=77)
        plain = [select(case.groups, case.scores, 0.25, roles=["ffn"], allocation=a) for a in ("uniform", "log_depth")]
        found, *others = (divergence(case.model, apply(case.model, p, copy=True), x) for p in (plan, *plain))
        assert found < min(others)


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


def test_a_cache_is_not_taken_for_a_model_of_another_configuration(tmp_path: Any) -> None:
    def divergence_of(act: str, cache: Any) -> float:
        case = make(tiny_llama(hidden_act=act), roles=("ffn",))
        plan = search_plan(
            case.model, case.groups, {n: np.arange(24.0)[None] for n in case.scores}, ids(), 0.1, roles=["ffn"],
            allocation="descent", cache=cache,
        )  # fmt: skip
        return plan.details["descent"]["divergence"]

    first, want = divergence_of("silu", tmp_path), divergence_of("relu", None)
    assert divergence_of("relu", tmp_path) == want != first


def remembered(file: Path) -> Remembered:
    """Of a measure whose total is the number of units of the group ``a``, plus 100 times that of the anchor."""
    bowl: Any = Bowl({})
    bowl.total = lambda widths, first, last: widths["a"] + 100 * bowl.anchors[-1]["a"]
    return Remembered(bowl, file, "x")


def test_measurements_are_told_apart_by_the_groups_names(tmp_path: Path) -> None:
    one, other = {"a": 10, "b": 12}, {"b": 10, "a": 12}  # the same numbers in the same order
    for _ in range(2):
        kept = remembered(tmp_path / "m.json")
        for anchor in (one, other):
            kept.anchor(anchor)
            assert [kept.total(w, 0, 1) for w in (one, other, dict(reversed(one.items())))] == [
                w + 100 * anchor["a"] for w in (10, 12, 10)
            ]


def test_measurements_of_the_format_without_names_are_made_anew(tmp_path: Path) -> None:
    file = tmp_path / "m.json"
    old = {"format": "pyprune-measurements", "version": 1, "fingerprint": "x", "totals": {"[[10], [10], 0, 1]": 5.0}}
    file.write_text(json.dumps(old))
    kept = remembered(file)
    kept.anchor({"a": 10})
    assert kept.total({"a": 10}, 0, 1) == 1010
    assert list(json.loads(file.read_text())["totals"].values()) == [1010]


def test_measurements_that_cannot_be_kept_cost_no_result(tmp_path: Path) -> None:
    (tmp_path / "folder").write_text("a file")
    kept = remembered(tmp_path / "folder" / "m.json")
    kept.anchor({"a": 10})
    with pytest.warns(UserWarning, match="the measurements are not kept"):
        assert kept.total({"a": 10}, 0, 1) == 1010
