"""Principal coordinates: which directions of a head's values can go."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyprune.basis.principal import principal_basis


def case(copies: int, units: int = 6, outputs: int = 9, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Second moments [copies, units, units] and readers [copies, outputs, units]."""
    torch.manual_seed(seed)
    inputs = torch.randn(copies, 40, units, dtype=torch.float64) @ torch.randn(units, units, dtype=torch.float64)
    return inputs.transpose(1, 2) @ inputs, torch.randn(copies, outputs, units, dtype=torch.float64)


def lost(moments: Tensor, readers: Tensor, basis: Tensor, inverse: Tensor, keep: int) -> float:
    """What readers lose when all but the first coordinates go."""
    part = inverse[:, keep:] @ basis[keep:]
    return sum(float((w @ part @ c * (w @ part)).sum()) for c, w in zip(moments, readers, strict=True))


@pytest.mark.parametrize("copies", [1, 3])
def test_the_two_matrices_are_inverse_and_the_coordinates_white(copies: int) -> None:
    moments, readers = case(copies)
    basis, inverse, values = principal_basis(moments, readers)
    one = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(basis @ inverse, one)
    torch.testing.assert_close(basis @ moments.mean(0) @ basis.t(), one)
    assert bool((values[:-1] >= values[1:]).all())


@pytest.mark.parametrize("keep", [1, 3, 5])
def test_of_one_reader_no_projection_of_that_rank_loses_less(keep: int) -> None:
    moments, readers = case(1)
    basis, inverse, values = principal_basis(moments, readers)
    power, axes = torch.linalg.eigh(moments[0])
    best = torch.linalg.svdvals(readers[0] @ (axes * power.sqrt()) @ axes.t())[keep:].square().sum()
    assert lost(moments, readers, basis, inverse, keep) == pytest.approx(float(best))
    assert float(values[keep:].sum()) == pytest.approx(float(best))


def test_of_several_readers_with_one_moment_the_values_are_what_is_lost() -> None:
    moments, readers = case(3)
    moments = moments.mean(0).expand(3, -1, -1)
    basis, inverse, values = principal_basis(moments, readers)
    for keep in range(1, 6):
        assert lost(moments, readers, basis, inverse, keep) == pytest.approx(float(values[keep:].sum()))


def test_directions_that_nothing_goes_along_come_last_and_stay_finite() -> None:
    moments, readers = case(2)
    moments[:, 2] = moments[:, :, 2] = 0
    basis, inverse, values = principal_basis(moments, readers)
    assert bool(basis.isfinite().all() and inverse.isfinite().all())
    assert float(values[-1]) < 1e-4 * float(values[-2])
    zeros = principal_basis(torch.zeros_like(moments), readers)
    assert all(bool(t.isfinite().all()) for t in zeros)


def test_signs_do_not_depend_on_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    moments, readers = case(1)
    basis, inverse, _ = principal_basis(moments, readers)
    eigh = torch.linalg.eigh

    def turned(matrix: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = eigh(matrix)
        return values, vectors * torch.tensor([1.0, -1, 1, -1, -1, 1], dtype=torch.float64)

    monkeypatch.setattr(torch.linalg, "eigh", turned)
    again = principal_basis(moments, readers)
    torch.testing.assert_close(again[0], basis)
    torch.testing.assert_close(again[1], inverse)
