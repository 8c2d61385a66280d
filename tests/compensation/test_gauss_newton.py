"""The Gauss-Newton step: what its formula says, in float64, and what its iterations come to."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from pyprune.compensation import gauss_newton
from pyprune.compensation.gauss_newton import Feeder, step


def problem(feeders: int, shared: bool = True) -> tuple[list[Feeder], Tensor, Tensor, Tensor]:
    """(feeders, residual, weights, reader) of 90 tokens, 5 channels, 4 inputs and 6 outputs."""
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(90, 4, generator=g) for _ in range(feeders)]
    made = [Feeder(inputs[0 if shared else i], torch.randn(90, 5, generator=g)) for i in range(feeders)]
    return made, torch.randn(90, 6, generator=g), torch.rand(90, generator=g) + 0.1, torch.randn(6, 5, generator=g)


def closed_form(feeders: list[Feeder], residual: Tensor, weights: Tensor, reader: Tensor, lam: float) -> list[Tensor]:
    """The minimum, from the design matrix of all changes at once."""
    root = weights.double().sqrt()
    columns, ridge = [], []
    for f in feeders:
        x, s, d = f.x.double(), f.slope.double(), reader.double()
        design = torch.einsum("oj,tj,ti->toji", d, s, x) * root[:, None, None, None]
        columns.append(design.reshape(len(x) * len(d), -1))
        mean = (x.square() * weights[:, None]).sum() / x.shape[1]
        c = d.square().sum(0) * (weights[:, None] * s.square()).sum(0) / weights.sum()
        c = c + 1e-3 * c.mean()
        ridge.append((lam * mean * c)[:, None].expand(-1, x.shape[1]).reshape(-1))
    a, b = torch.cat(columns, 1), (residual.double() * root[:, None]).reshape(-1)
    found = torch.linalg.solve(a.t() @ a + torch.diag(torch.cat(ridge)), a.t() @ b)
    return [p.reshape(5, 4) for p in found.split(20)]


@pytest.mark.parametrize(("feeders", "shared"), [(1, True), (2, True), (2, False)])
def test_many_iterations_give_the_minimum_of_the_formula(
    feeders: int, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gauss_newton, "CHUNK", 32)
    given = problem(feeders, shared)
    for found, wanted in zip(step(*given, 0.1, 60), closed_form(*given, 0.1), strict=True):
        assert torch.allclose(found.double(), wanted, rtol=1e-3, atol=1e-4)


def test_the_tokens_in_one_piece_and_in_many_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = step(*problem(2), 0.1, 5)
    monkeypatch.setattr(gauss_newton, "CHUNK", 7)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(whole, step(*problem(2), 0.1, 5), strict=True))


def test_every_iteration_comes_nearer() -> None:
    feeders, residual, weights, reader = problem(2)

    def left(changes: list[Tensor]) -> float:
        moved = sum((f.slope * (f.x @ p.t()) for f, p in zip(feeders, changes, strict=True)), torch.zeros(90, 5))
        return float(((residual - moved @ reader.t()).square() * weights[:, None]).sum())

    errors = [left(step(feeders, residual, weights, reader, 0.001, n)) for n in range(8)]
    assert all(b < a for a, b in pairwise(errors))


def test_bfloat16_products_come_to_nearly_the_same() -> None:
    feeders, residual, weights, reader = problem(2)
    wide = step(feeders, residual, weights, reader, 0.1, 6)
    half = [f.x.bfloat16() for f in feeders[:1]]
    narrow = [Feeder(half[0], f.slope.bfloat16()) for f in feeders]
    found = step(narrow, residual.bfloat16(), weights, reader, 0.1, 6)
    assert all(f.dtype == torch.float32 and (f - w).norm() < 0.02 * w.norm() for f, w in zip(found, wide, strict=True))


def test_nothing_left_or_dead_channels_change_nothing() -> None:
    feeders, residual, weights, reader = problem(2)
    assert all(not p.any() for p in step(feeders, torch.zeros_like(residual), weights, reader, 0.1, 4))
    for f in feeders:
        f.slope[:, 2] = 0
    changes = step(feeders, residual, weights, reader, 0.1, 4)
    assert all(p.isfinite().all() and p[2].abs().max() == 0 and p.any() for p in changes)
