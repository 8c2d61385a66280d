"""Optimal-brain-surgeon removal against exhaustive search with exact refits."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from helpers_compensation import ids, off, planned
from helpers_llama import tiny_llama

import pyprune
from pyprune import apply
from pyprune.compensation import compensate
from pyprune.compensation.removal import PENALTY, PENALTY_HEADS, removed_units, ridge
from pyprune.errors import PyPruneError


def problem(inputs: int, outputs: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A Gram matrix of correlated inputs and a weight."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(200, inputs, generator=generator, dtype=torch.float64) @ mix
    return x.t() @ x, torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)


def error(gram: torch.Tensor, weight: torch.Tensor, gone: list[int], penalty: float = PENALTY) -> float:
    """Least squared error, ridge included, of any weight without the inputs ``gone``."""
    h = gram + torch.diag(ridge(gram, penalty))
    kept = [i for i in range(len(gram)) if i not in gone]
    best = torch.linalg.solve(h[kept][:, kept], (weight @ h)[:, kept].t()).t()
    return float(((weight @ h) * weight).sum() - (best * (weight @ h)[:, kept]).sum())


@pytest.mark.parametrize("seed", range(3))
def test_every_step_removes_the_input_whose_loss_the_best_refit_makes_least(seed: int) -> None:
    gram, weight = problem(10, 4, seed)
    gone: list[int] = []
    grown = [0.0]
    for _ in range(6):
        left = [i for i in range(10) if i not in gone]
        gone.append(min(left, key=lambda i: error(gram, weight, [*gone, i])))
        grown.append(error(gram, weight, gone))
    positions = np.arange(10)[None, :, None]
    for count in range(7):
        found = removed_units(gram, weight, positions, count, np.empty(0, dtype=np.int64))
        assert sorted(np.flatnonzero(found[0])) == sorted(gone[:count])
    assert grown == sorted(grown)


def test_units_of_several_inputs_go_together_and_every_copy_loses_as_many() -> None:
    gram, weight = problem(24, 5, 3)
    positions = np.arange(24).reshape(2, 4, 3)
    found = removed_units(gram, weight, positions, 1, np.empty(0, dtype=np.int64))
    alone = [[error(gram, weight, positions[o, u].tolist(), PENALTY_HEADS) for u in range(4)] for o in range(2)]
    assert found.tolist() == [[u == int(np.argmin(row)) for u in range(4)] for row in alone]


def test_inputs_that_other_groups_remove_are_gone_before_the_choice() -> None:
    gram, weight = problem(8, 3, 5)
    taken = np.array([0, 3])
    found = removed_units(gram, weight, np.arange(8)[None, :, None], 3, taken)
    third = min((i for i in range(8) if i not in (0, 3)), key=lambda i: error(gram, weight, [0, 3, i]))
    assert np.flatnonzero(found[0]).tolist() == sorted([0, 3, third])


def test_dead_inputs_go_first_and_an_all_dead_matrix_is_answered() -> None:
    gram, weight = problem(6, 3, 7)
    gram[2] = gram[:, 2] = 0
    found = removed_units(gram, weight, np.arange(6)[None, :, None], 1, np.empty(0, dtype=np.int64))
    assert np.flatnonzero(found[0]).tolist() == [2]
    none = removed_units(torch.zeros_like(gram), weight, np.arange(6)[None, :, None], 2, np.empty(0, dtype=np.int64))
    assert none.sum() == 2


def test_a_model_keeps_its_widths_and_more_of_its_logits_than_under_random_units() -> None:
    dense = tiny_llama()
    plan = planned(dense, "random", kv_heads=1, ffn=14)
    refitted, chosen = copy.deepcopy(dense), copy.deepcopy(dense)
    compensate(refitted, plan, ids(120))
    done = compensate(chosen, plan, ids(120), "obs")
    assert [(c.group.name, c.width) for c in done.plan.cuts] == [(c.group.name, c.width) for c in plan.cuts]
    assert {c.kept for c in done.plan.cuts} != {c.kept for c in plan.cuts}
    assert off(apply(chosen, done.plan, copy=True), dense) < off(apply(refitted, plan), dense)
    before = chosen(ids(3)).logits
    torch.testing.assert_close(apply(chosen, done.plan)(ids(3)).logits, before, rtol=1e-4, atol=1e-4)


def test_the_whole_line_applies_the_plan_of_the_chosen_units() -> None:
    out = pyprune.prune(
        tiny_llama(), ratio=0.2, calibration=ids(), criterion="random", compensation="obs", roles=["ffn"]
    )
    assert {c.group.role for c in out.plan.cuts} == {"ffn"}
    down = dict(out.model.named_parameters())["model.layers.0.mlp.down_proj.weight"]
    assert down.shape[1] == out.plan.cuts[0].width and bool((down != 0).any(dim=0).all())


def alone(gram: torch.Tensor, weight: torch.Tensor, unit: list[int]) -> float:
    """Squared error of the output when these inputs are dropped and nothing takes over."""
    return float(((weight[:, unit] @ gram[unit][:, unit]) * weight[:, unit]).sum())


@pytest.mark.parametrize("k", [1, 3])
def test_worth_has_half_a_say_in_the_first_choice(k: int) -> None:
    gram, weight = problem(12, 4, 11)
    positions = np.arange(12).reshape(1, 12 // k, k)
    worth = torch.rand(1, 12 // k, generator=torch.Generator().manual_seed(1)) ** 3
    none = np.empty(0, dtype=np.int64)
    units = positions[0].tolist()
    lam = PENALTY if k == 1 else PENALTY_HEADS
    scores = [
        error(gram, weight, u, lam) * (float(f) / alone(gram, weight, u)) ** 0.5
        for u, f in zip(units, worth[0], strict=True)
    ]
    for scale in (1.0, 1e-6, 1e6):
        found = removed_units(gram, weight, positions, 1, none, worth * scale)
        assert np.flatnonzero(found[0]).tolist() == [int(np.argmin(scores))]


def test_worth_that_says_what_the_output_says_changes_nothing() -> None:
    gram, weight = problem(12, 4, 13)
    positions = np.arange(12).reshape(1, 12, 1)
    same = torch.tensor([[alone(gram, weight, [u]) for u in range(12)]])
    none = np.empty(0, dtype=np.int64)
    for count in range(13):
        found = removed_units(gram, weight, positions, count, none, same)
        assert (found == removed_units(gram, weight, positions, count, none)).all()


def test_units_that_are_worth_nothing_or_dead_go_first() -> None:
    gram, weight = problem(6, 3, 7)
    gram[2] = gram[:, 2] = 0
    worth = torch.tensor([[5.0, 4.0, 9.0, 0.0, 3.0, 2.0]])
    found = removed_units(gram, weight, np.arange(6)[None, :, None], 2, np.empty(0, dtype=np.int64), worth)
    assert np.flatnonzero(found[0]).tolist() == [2, 3]


def test_a_compensation_told_what_units_are_worth_chooses_others() -> None:
    dense = tiny_llama()
    plan, groups = planned(dense, "random", ffn=14), pyprune.discover(dense)
    worth = pyprune.score(dense, groups, ids(20), "token_fisher", roles=["ffn"])
    without, told, same = (copy.deepcopy(dense) for _ in range(3))
    first = compensate(without, plan, ids(40), "obs")
    second = compensate(told, plan, ids(40), "obs", worth=worth)
    assert {c.kept for c in first.plan.cuts} != {c.kept for c in second.plan.cuts}
    assert {c.kept for c in compensate(same, plan, ids(40), "obs", worth={}).plan.cuts} == {
        c.kept for c in first.plan.cuts
    }


def test_the_whole_line_lets_a_criterion_have_its_say() -> None:
    options = {"ratio": 0.2, "calibration": ids(40), "criterion": "wanda", "compensation": "obs", "roles": ["ffn"]}
    plain = pyprune.prune(tiny_llama(), **options)
    told = pyprune.prune(tiny_llama(), compensation_criterion="token_fisher", **options)
    assert {c.kept for c in plain.plan.cuts} != {c.kept for c in told.plan.cuts}
    assert "score for choice" in [s["name"] for s in told.report.stages]


def test_widths_are_settled_with_units_in_the_order_of_the_first_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def select(groups: Any, scores: Any, *args: Any, allocation_scores: Any = None, **more: Any) -> Any:
        asked.update(order=scores, shares=allocation_scores)
        return pyprune.select(groups, scores, *args, allocation_scores=allocation_scores, **more)

    monkeypatch.setattr("pyprune.cutting.select", select)
    options = {"ratio": 0.2, "calibration": ids(40), "criterion": "wanda", "compensation": "obs", "roles": ["ffn"]}
    out = pyprune.prune(tiny_llama(), compensation_criterion="token_fisher", **options)
    worth = pyprune.score(tiny_llama(), out.groups, ids(40), "token_fisher", roles=["ffn"])
    assert asked["order"].details["weighed_by"] == "token_fisher"
    for name, values in out.scores.items():
        torch.testing.assert_close(asked["order"][name], (values * worth[name]).sqrt(), rtol=1e-4, atol=0.0)
        assert torch.equal(asked["shares"][name], values)


def test_which_heads_go_is_left_to_their_output(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def watched(*args: Any, worth: Any = None, **more: Any) -> Any:
        asked.update(worth=worth)
        return compensate(*args, worth=worth, **more)

    def select(groups: Any, scores: Any, *args: Any, **more: Any) -> Any:
        asked.update(order=scores)
        return pyprune.select(groups, scores, *args, **more)

    monkeypatch.setattr("pyprune.cutting.compensate", watched)
    monkeypatch.setattr("pyprune.cutting.select", select)
    options = {"ratio": 0.2, "calibration": ids(40), "criterion": "wanda", "compensation": "obs"}
    for more in ({}, {"allocation": "knapsack", "allocation_criterion": "token_fisher"}):
        out = pyprune.prune(
            tiny_llama(), compensation_criterion="token_fisher", roles=["kv_heads", "ffn"], **options, **more
        )
        roles = {g.name: g.role for g in out.groups}
        assert set(asked["order"]) == set(out.scores) and {roles[n] for n in out.scores} == {"kv_heads", "ffn"}
        assert {roles[n] for n in asked["worth"]} == {"ffn"}
        for name, values in out.scores.items():
            assert torch.equal(asked["order"][name], values) == (roles[name] == "kv_heads")
    with pytest.raises(PyPruneError, match="compensation_criterion 'token_fisher': has a say in which channels go"):
        pyprune.prune(tiny_llama(), compensation_criterion="token_fisher", roles=["kv_heads"], **options)


def test_worth_that_fits_nothing_is_refused() -> None:
    dense = tiny_llama()
    plan = planned(dense, "random", ffn=14)
    name = plan.cuts[0].group.name
    for mode, worth, problem in (
        ("least-squares", {name: torch.ones(1, 24)}, "takes those of the plan"),
        ("obs", {name: torch.ones(1, 23)}, r"has shape \[1, 23\] for \[1, 24\] units"),
        ("obs", {name: torch.full((1, 24), float("nan"))}, "holds NaN"),
    ):
        with pytest.raises(PyPruneError, match=problem):
            compensate(copy.deepcopy(dense), plan, ids(8), mode, worth=worth)
    with pytest.raises(PyPruneError, match="only compensation obs chooses them anew"):
        pyprune.prune(
            tiny_llama(), ratio=0.2, criterion="l2", compensation="least-squares", calibration=ids(8),
            compensation_criterion="token_fisher",
        )  # fmt: skip
    with pytest.raises(PyPruneError, match="criterion"):
        pyprune.prune(
            tiny_llama(), ratio=0.2, criterion="l2", compensation="obs", calibration=ids(8),
            compensation_criterion="tokenfisher",
        )  # fmt: skip
