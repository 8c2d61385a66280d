"""Reconstruction of an FFN from its inputs and outputs: what it minimises, and how it behaves at the edges."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from pyprune.compensation import reconstruction
from pyprune.compensation.reconstruction import Feeder, reconstruct

Problem = tuple[dict[str, Feeder], Tensor, Tensor | None, Tensor, Tensor, float]

ERROR = 0.3  # near what every problem begins with


def gated(z: Mapping[str, Tensor]) -> Tensor:
    return silu(z["gate"]) * z["up"]


def problem(dtype: torch.dtype = torch.float32, tokens: int = 2000, bias: bool = False, away: float = 0.3) -> Problem:
    """Matrices some way from those that made the targets: (feeders, reader, offset, targets, weights)."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, 8, generator=g)
    true = {n: torch.randn(12, 8, generator=g) / 3 for n in ("gate", "up")}
    reader, offset = torch.randn(6, 12, generator=g) / 3, torch.randn(6, generator=g) if bias else None
    biases = {n: torch.randn(12, generator=g) / 3 if bias else None for n in true}
    z = {n: x @ w.t() + (0 if biases[n] is None else biases[n]) for n, w in true.items()}
    targets = gated(z) @ reader.t() + (0 if offset is None else offset)
    narrow = x.to(dtype)
    feeders = {n: Feeder(narrow, w + away * torch.randn(w.shape, generator=g) / 3, biases[n]) for n, w in true.items()}
    reader = reader + away * torch.randn(reader.shape, generator=g) / 3
    return feeders, reader, offset, targets.to(dtype), torch.rand(tokens, generator=g) + 0.1, ERROR


def error(given: Problem, matrices: Mapping[str, Tensor], reader: Tensor) -> float:
    feeders, _, offset, targets, weights, _ = given
    z = {n: f.x.float() @ matrices[n].t() + (0 if f.bias is None else f.bias) for n, f in feeders.items()}
    outputs = gated(z) @ reader.t() + (0 if offset is None else offset)
    return float(((outputs - targets.float()).square() * weights[:, None]).sum())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_it_finds_is_much_nearer_to_the_targets(dtype: torch.dtype, bias: bool) -> None:
    given = problem(dtype, bias=bias)
    before = error(given, {n: f.matrix for n, f in given[0].items()}, given[1])
    assert error(given, *reconstruct(gated, *given)) < 0.5 * before


@pytest.mark.parametrize("bias", [False, True])
def test_its_gradients_are_those_of_the_weighted_error(bias: bool) -> None:
    given = problem(tokens=40, bias=bias)
    feeders, reader, offset, targets, weights, _ = given
    values = [v.clone().requires_grad_() for v in (*(f.matrix for f in feeders.values()), reader)]
    z = {n: f.x @ w.t() + (0 if f.bias is None else f.bias) for (n, f), w in zip(feeders.items(), values, strict=False)}
    outputs = gated(z) @ values[-1].t() + (0 if offset is None else offset)
    wanted = torch.autograd.grad((outputs - targets).square().mul(weights[:, None]).sum() / 2, values)
    made = reconstruction._Problem(gated, feeders, offset)
    plain = [v.detach() for v in values]
    found = made.gradients(torch.arange(40), targets, weights[:, None], plain)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(found, wanted, strict=True))


def test_equal_calls_give_equal_bits_and_leave_what_they_were_given() -> None:
    given = problem()
    before = [f.matrix.clone() for f in given[0].values()], given[1].clone()
    (a, d), (b, e) = (reconstruct(gated, *given) for _ in range(2))
    assert torch.equal(d, e) and all(torch.equal(a[n], b[n]) for n in a)
    assert all(torch.equal(f.matrix, w) for f, w in zip(given[0].values(), before[0], strict=True))
    assert torch.equal(given[1], before[1])


def test_tokens_of_no_weight_count_nothing() -> None:
    feeders, reader, offset, targets, weights, _ = problem()
    weights[::2] = 0
    spoilt = targets.clone()
    spoilt[::2] = 1e3
    (a, d), (b, e) = (reconstruct(gated, feeders, reader, offset, t, weights, ERROR) for t in (targets, spoilt))
    scaled = float((weights[:, None] * spoilt.square()).sum() / (weights[:, None] * targets.square()).sum())
    assert scaled == pytest.approx(1) and torch.allclose(d, e) and all(torch.allclose(a[n], b[n]) for n in a)


def test_steps_are_longer_where_there_is_farther_to_go(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    step = torch.optim.Adam.step

    def noted(adam: torch.optim.Adam) -> None:
        group = adam.param_groups[0]
        rates.append(group["lr"] / size)
        step(adam)

    monkeypatch.setattr(torch.optim.Adam, "step", noted)
    largest = []
    for far in (0.0, 0.1, 0.2, 1.0):
        rates.clear()
        given = problem(tokens=500)
        size = float(given[0]["gate"].matrix.square().mean().sqrt())
        reconstruct(gated, *given[:-1], far)
        largest.append(max(rates))
        assert min(rates) == rates[-1] == 0
    assert largest[2] == pytest.approx(2 * largest[1])
    assert 0 < largest[0] < largest[1] and largest[2] < largest[3] < 0.03


@pytest.mark.parametrize("tokens", [1, 3, 250])
def test_few_tokens_are_enough_for_a_finite_answer(tokens: int) -> None:
    found, reader = reconstruct(gated, *problem(tokens=tokens))
    assert all(w.isfinite().all() for w in (*found.values(), reader))


def test_dead_channels_and_targets_of_zero_give_no_nan() -> None:
    feeders, reader, offset, targets, weights, _ = problem()
    for f in feeders.values():
        f.matrix[3] = 0
    found, reader = reconstruct(gated, feeders, reader, offset, torch.zeros_like(targets), weights, ERROR)
    assert all(w.isfinite().all() for w in (*found.values(), reader))
