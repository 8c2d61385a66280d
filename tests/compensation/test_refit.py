"""The least-squares refit of one matrix against its closed form, and what it does with unfit inputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyprune.compensation.refit import Sums, refit, solve, squared_error


def correlated(rows: int, inputs: int, seed: int = 0) -> Tensor:
    """Float64 inputs [rows, inputs] that a few directions explain."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.randn(rows, max(1, inputs // 3), dtype=torch.float64, generator=generator)
    mix = torch.randn(low.shape[1], inputs, dtype=torch.float64, generator=torch.Generator().manual_seed(99))
    return low @ mix + 0.1 * torch.randn(rows, inputs, dtype=torch.float64, generator=generator)


def sums(x: Tensor, weights: Tensor | None = None, target: Tensor | None = None) -> Sums:
    out = Sums(x.new_zeros(x.shape[1], x.shape[1]))
    out.add(x, torch.ones(len(x)) if weights is None else weights, target)
    return out


WEIGHT = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
KEPT = torch.tensor([0, 2, 3, 5, 6, 8, 10])


def test_the_solution_is_the_least_squares_one_when_the_penalty_is_zero() -> None:
    x = correlated(200, 12)
    made = solve(sums(x).gram, sums(x).gram @ WEIGHT.t(), WEIGHT, KEPT, 0.0)
    want = torch.linalg.lstsq(x[:, KEPT], x @ WEIGHT.t()).solution.t()
    assert made is not None
    torch.testing.assert_close(made, want, rtol=1e-8, atol=1e-8)


def test_the_penalty_is_ridge_regression_towards_the_original_columns() -> None:
    x, lam = correlated(40, 12), 0.3
    made = solve(sums(x).gram, sums(x).gram @ WEIGHT.t(), WEIGHT, KEPT, lam)
    mean = x[:, KEPT].square().sum(0).mean()
    rows = torch.cat([x[:, KEPT], (lam * mean).sqrt() * torch.eye(len(KEPT), dtype=torch.float64)])
    goals = torch.cat([x @ WEIGHT.t(), (lam * mean).sqrt() * WEIGHT[:, KEPT].t()])
    assert made is not None
    torch.testing.assert_close(made, torch.linalg.lstsq(rows, goals).solution.t(), rtol=1e-8, atol=1e-8)


def test_a_large_penalty_leaves_the_original_columns() -> None:
    x = correlated(40, 12)
    made = solve(sums(x).gram, sums(x).gram @ WEIGHT.t(), WEIGHT, KEPT, 1e12)
    assert made is not None
    torch.testing.assert_close(made, WEIGHT[:, KEPT], rtol=1e-6, atol=1e-6)


def test_the_error_from_sums_is_the_error_over_the_tokens() -> None:
    x, w = correlated(50, 12), torch.rand(50, generator=torch.Generator().manual_seed(1))
    target, trial = x @ WEIGHT.t() + 1, 0.9 * WEIGHT[:, KEPT]
    found = sums(x, w, target)
    assert found.cross is not None
    got = squared_error(found.gram, found.cross, found.power, trial, KEPT)
    want = float((w.double()[:, None] * (target - x[:, KEPT] @ trial.t()).square()).sum())
    assert got == pytest.approx(want, rel=1e-9)


def test_the_refit_lowers_the_error_on_tokens_it_has_not_seen() -> None:
    train, held = sums(correlated(300, 12)), sums(correlated(100, 12, seed=1))
    found = refit(WEIGHT, KEPT, train, held)
    assert found.after < 0.2 * found.before and found.penalty is not None
    alone = solve(train.gram, train.gram @ WEIGHT.t(), WEIGHT, KEPT, found.penalty)
    assert alone is not None
    x = correlated(100, 12, seed=1)
    off = (x @ WEIGHT.t() - x[:, KEPT] @ alone.t()).square().sum() / (x @ WEIGHT.t()).square().sum()
    assert found.after == pytest.approx(float(off), rel=1e-9)


def test_the_tokens_that_chose_the_penalty_join_the_fit() -> None:
    train, held = sums(correlated(300, 12)), sums(correlated(100, 12, seed=1))
    found = refit(WEIGHT, KEPT, train, held)
    gone = [i for i in range(12) if i not in KEPT.tolist()]
    assert (found.weight[:, gone] == 0).all() and found.penalty is not None
    gram = train.gram + held.gram
    want = solve(gram, gram @ WEIGHT.t(), WEIGHT, KEPT, found.penalty)
    assert want is not None
    torch.testing.assert_close(found.weight[:, KEPT], want, rtol=1e-9, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 40), seed=st.integers(0, 1000), scale=st.sampled_from([1e-12, 1.0, 1e12]))
def test_the_held_out_error_is_never_above_that_without_a_refit(rows: int, seed: int, scale: float) -> None:
    found = refit(WEIGHT, KEPT, sums(scale * correlated(rows, 12, seed)), sums(scale * correlated(9, 12, seed + 1)))
    assert found.after <= found.before
    assert found.weight.isfinite().all()


def test_noise_to_fit_on_leaves_the_columns_as_they_were() -> None:
    x = torch.randn(4, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    held = torch.zeros(30, 12, dtype=torch.float64)
    held[:, KEPT] = torch.randn(30, len(KEPT), dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    found = refit(
        WEIGHT, KEPT, sums(x), sums(held)
    )  # here the removed inputs are silent: nothing is better than nothing
    assert found.penalty is None and found.after == found.before
    assert torch.equal(found.weight[:, KEPT], WEIGHT[:, KEPT])


def test_dead_inputs_keep_their_original_columns() -> None:
    x, held = correlated(100, 12), correlated(50, 12, seed=1)
    x[:, 3] = held[:, 3] = 0
    found = refit(WEIGHT, KEPT, sums(x), sums(held))
    assert found.after < found.before
    torch.testing.assert_close(found.weight[:, 3], WEIGHT[:, 3], rtol=1e-9, atol=1e-9)


def test_inputs_that_are_all_zero_change_nothing() -> None:
    zero = sums(torch.zeros(20, 12, dtype=torch.float64))
    found = refit(WEIGHT, KEPT, zero, zero)
    assert (found.penalty, found.before, found.after) == (None, 0.0, 0.0)
    assert torch.equal(found.weight[:, KEPT], WEIGHT[:, KEPT])


def test_without_held_out_tokens_nothing_is_fitted() -> None:
    nothing = Sums(torch.zeros(12, 12, dtype=torch.float64))
    found = refit(WEIGHT, KEPT, sums(correlated(100, 12)), nothing)
    assert found.penalty is None and torch.equal(found.weight[:, KEPT], WEIGHT[:, KEPT])


def test_separate_targets_are_taken_as_far_as_the_held_out_error_agrees() -> None:
    x, held = correlated(300, 12), correlated(100, 12, seed=1)
    shift = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    other = WEIGHT + shift  # the targets can be had from the inputs: they are worth fitting
    found = refit(WEIGHT, KEPT, sums(x, target=x @ other.t()), sums(held, target=held @ other.t()))
    assert found.blend == 1.0 and found.after < 0.5 * found.before
    noise = torch.randn(300, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(9)) * 50
    found = refit(WEIGHT, KEPT, sums(x, target=x @ WEIGHT.t() + noise), sums(held, target=held @ WEIGHT.t()))
    assert found.blend < 1.0


def test_weights_that_their_type_has_no_room_for_are_not_chosen() -> None:
    x, held = correlated(100, 12), correlated(50, 12, seed=1)
    small = x.clone()
    free, bound = (
        refit(WEIGHT, KEPT, sums(x), sums(held)),
        refit(WEIGHT, KEPT, sums(x), sums(held), dtype=torch.float16),
    )
    assert bound.penalty == free.penalty and torch.equal(bound.weight, free.weight)
    for rows in (small, held := held.clone()):
        rows[:, KEPT] *= 1e-7  # what is left would have to be multiplied by ten millions
    free, bound = (
        refit(WEIGHT, KEPT, sums(small), sums(held)),
        refit(WEIGHT, KEPT, sums(small), sums(held), dtype=torch.float16),
    )
    assert free.penalty is not None and not bool(free.weight.half().isfinite().all())
    assert bool(bound.weight.half().isfinite().all()) and bound.after <= bound.before
