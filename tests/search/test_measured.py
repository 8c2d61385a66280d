"""What the allocations that measure widths once, ``divergence`` and ``descent``, hold in common."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from helpers_families import build
from helpers_llama import tiny_llama
from helpers_mixtures import mixture
from helpers_search import ids, make

import pyprune
from pyprune import measure_budget, select
from pyprune.errors import PyPruneError
from pyprune.search import search_plan
from pyprune.search.fitness import Fitness

ALLOCATIONS = ("divergence", "descent")


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_the_budget_is_met_in_its_unit_and_the_weights_stay(allocation: str) -> None:
    case = make(tiny_llama(intermediate_size=96), roles=("ffn",))
    before = [p.clone() for p in case.model.parameters()]
    macs = measure_budget(case.model, case.groups, "macs")
    for budget in ("parameters", macs):
        plan = search_plan(
            case.model, case.groups, case.scores, ids(), 0.3, roles=["ffn"], allocation=allocation, budget=budget
        )
        spent = plan.details["budget"] or plan.details["achieved"]["with_embeddings"]
        assert abs(spent["after"] - 0.7 * spent["before"]) <= 3 * 32
    assert all(torch.equal(a, b) for a, b in zip(before, case.model.parameters(), strict=True))


@pytest.mark.parametrize("family", ["GPT-2", "Mixtral", "heads"])
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_other_families_and_roles_are_measured(allocation: str, family: str, tmp_path: Any) -> None:
    if family == "heads":
        model, roles = tiny_llama(num_hidden_layers=4), ("kv_heads", "ffn")
    else:
        model = mixture("mixtral", intermediate_size=64) if family == "Mixtral" else build(family, tmp_path)
        roles = ("expert_ffn",) if family == "Mixtral" else ("kv_heads", "ffn")
    case = make(model, roles=roles)
    plan = search_plan(case.model, case.groups, case.scores, ids(), 0.15, roles=roles, allocation=allocation)
    assert plan.cuts and plan.details["allocation"] == allocation
    assert plan.details["achieved"]["with_embeddings"]["ratio"] == pytest.approx(0.15, abs=0.03)


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"search_minutes": 3}, "search_minutes"),
        ({"search_steps": 3}, "search_steps"),
        ({"iterative_steps": 2}, "iterative_steps"),
        ({"calibration": None}, "calibration"),
        ({"calibration": ids(3)}, "samples"),
        ({"roles": "hidden"}, "roles"),
    ],
)
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_mistakes_are_named(allocation: str, options: dict[str, Any], option: str) -> None:
    given: dict[str, Any] = {
        "ratio": 0.1, "calibration": ids(), "criterion": "l2", "allocation": allocation, **options
    }  # fmt: skip
    with pytest.raises(PyPruneError) as error:
        pyprune.prune(tiny_llama(), **given)
    assert error.value.option == option


EVERY = (*ALLOCATIONS, "search")


@pytest.mark.parametrize("allocation", EVERY)
def test_a_model_that_breaks_however_it_is_cut_is_refused(allocation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(roles=("ffn",))
    real = Fitness.total

    def total(self: Fitness, widths: Any, first: int, last: int) -> float:
        whole = all(case.groups[n].units == w for n, w in widths.items())
        return real(self, widths, first, last) if whole else float("inf")

    monkeypatch.setattr(Fitness, "total", total)
    with pytest.raises(PyPruneError, match=r"model: gives NaN or infinity on the calibration text.* float32 or bfl"):
        search_plan(case.model, case.groups, case.scores, ids(), 0.1, roles=["ffn"], allocation=allocation)


@pytest.mark.parametrize("allocation", EVERY)
def test_candidates_that_break_the_model_have_no_figure_in_the_report(
    allocation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make(roles=("ffn",))
    real = Fitness.total
    (first, *_) = case.groups.prunable(["ffn"])

    def total(self: Fitness, widths: Any, start: int, last: int) -> float:
        return float("inf") if widths.get(first.name, first.units) < 20 else real(self, widths, start, last)

    monkeypatch.setattr(Fitness, "total", total)
    plan = search_plan(
        case.model, case.groups, case.scores, ids(), 0.1, roles=["ffn"], allocation=allocation,
        **({"steps": 2} if allocation == "search" else {}),
    )  # fmt: skip
    text = json.dumps(plan.details, allow_nan=False)
    assert "null" in json.dumps(plan.details[allocation]["curves" if allocation == "divergence" else "starts"])
    assert json.loads(text)[allocation]["divergence"] > 0


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_select_alone_says_what_they_need(allocation: str) -> None:
    case = make()
    with pytest.raises(PyPruneError, match="needs a model and text"):
        select(case.groups, case.scores, 0.2, allocation=allocation)
