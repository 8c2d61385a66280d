"""Sums per channel of activations: against float64, over dtypes, shapes and strides, and bit for bit."""

from __future__ import annotations

import pytest
import torch
from helpers_ops import DEVICES, FLOATS, make
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyprune import ops

ALL = [*FLOATS, torch.float64]
SHAPES = [
    (1,), (33,), (0,), (1, 1), (5, 7), (129, 16), (300, 47), (0, 5), (5, 0), (1, 4097), (3, 9000),
    (2, 5, 7), (3, 129, 33), (4, 1, 16), (0, 3, 4), (2, 0, 4), (2, 3, 0), (2, 3, 4, 5), (2, 0, 3, 4),
]  # fmt: skip


def data(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Tensor:
    return make(shape, dtype, device, torch.Generator().manual_seed(seed))


def assert_sum(got: Tensor, terms: Tensor, dim: int, dtype: torch.dtype) -> None:
    """``got`` is the sum of the float64 terms, within a few roundings of the sum of their magnitudes."""
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got.shape == terms.sum(dim).shape
    bound = (1e-13 if dtype == torch.float64 else 4e-6) * terms.abs().sum(dim)
    assert bool(((got.cpu().double() - terms.sum(dim)).abs() <= bound).all())


def assert_moments(x: Tensor) -> None:
    sums, squares = ops.channel_moments(x)
    rows = x.cpu().double().reshape(x.shape[:-1].numel(), x.shape[-1])
    assert_sum(sums, rows, 0, x.dtype)
    assert_sum(squares, rows * rows, 0, x.dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("shape", SHAPES)
def test_moments_match_float64(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    assert_moments(data(shape, dtype, device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("shape", [s for s in SHAPES if len(s) == 3])
def test_dots_match_float64(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    a, b = data(shape, dtype, device), data(shape, dtype, device, seed=1)
    assert_sum(ops.channel_dots(a, b), a.cpu().double() * b.cpu().double(), 1, dtype)


@pytest.mark.parametrize("device", DEVICES)
def test_dots_of_flattened_samples_equal_those_of_a_batch(device: str) -> None:
    a, b = data((3, 10, 20), torch.float32, device), data((3, 10, 20), torch.float32, device, seed=1)
    expected = ops.channel_dots(a, b)
    assert torch.equal(ops.channel_dots(a.flatten(0, 1), b.flatten(0, 1), samples=3), expected)
    assert torch.equal(ops.channel_dots(a.view(3, 2, 5, 20), b.view(3, 2, 5, 20), samples=3), expected)
    torch.testing.assert_close(ops.channel_dots(a, b, samples=1)[0], expected.sum(0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_views_of_any_layout_equal_their_contiguous_copies(dtype: torch.dtype, device: str) -> None:
    base, other = data((6, 40, 70), dtype, device), data((6, 40, 70), dtype, device, seed=1)

    def views(t: Tensor) -> list[Tensor]:
        return [
            t[:, :, 3:60], t[::2], t[:, 1::3], t.transpose(0, 1), t.transpose(1, 2), t[:, :, ::2],
            t[:1].expand(4, 40, 70),
        ]  # fmt: skip

    for a, b in zip(views(base), views(other), strict=True):
        assert torch.equal(ops.channel_dots(a, b), ops.channel_dots(a.contiguous(), b.contiguous()))
        for x, y in zip(ops.channel_moments(a), ops.channel_moments(a.contiguous()), strict=True):
            assert torch.equal(x, y)


@given(draw=st.data())
@settings(max_examples=150, deadline=None)
def test_any_view_of_any_dtype_matches_float64(draw: st.DataObject) -> None:
    dtype = draw.draw(st.sampled_from(ALL))
    shape = tuple(draw.draw(st.integers(0, limit)) for limit in (5, 150, 150))
    order = draw.draw(st.permutations(range(3)))
    cuts = tuple(slice(draw.draw(st.integers(0, 3)), None, draw.draw(st.integers(1, 3))) for _ in shape)
    a, b = (data(shape, dtype, seed=seed)[cuts].permute(*order) for seed in (0, 1))
    assert_moments(a)
    assert_sum(ops.channel_dots(a, b), a.double() * b.double(), 1, dtype)


def test_the_number_of_threads_changes_no_bit() -> None:
    a, b = data((7, 300, 5000), torch.bfloat16), data((7, 300, 5000), torch.bfloat16, seed=1)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append([*ops.channel_moments(a), ops.channel_dots(a, b)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(other, results[0], strict=True))


def test_many_rows_do_not_lose_precision() -> None:
    """A million equal terms: float32 sums carried through all rows would be off by thousands of roundings."""
    x = torch.full((1_000_000, 2), 0.1)
    sums, squares = ops.channel_moments(x)
    exact = 1e6 * float(x[0, 0])
    assert abs(float(sums[0]) / exact - 1) < 2e-6
    assert abs(float(squares[1]) / (exact * float(x[0, 0])) - 1) < 2e-6


@pytest.mark.parametrize("device", DEVICES)
def test_nan_stays_in_its_channel(device: str) -> None:
    x = torch.ones(40, 50, device=device)
    x[7, 11] = float("nan")
    for t in ops.channel_moments(x):
        assert t.isnan().nonzero().flatten().tolist() == [11]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("shape", [(5000, 7), (3, 20, 9), (0, 4), (4, 0), (6,)])
def test_gram_matches_float64_and_adds_to_a_given_matrix(
    shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    x = data(shape, dtype, device)
    rows = x.cpu().double().reshape(x.shape[:-1].numel(), x.shape[-1])
    expected, mass = rows.t() @ rows, rows.abs().t() @ rows.abs()
    tolerance = 1e-13 if dtype == torch.float64 else 2e-5  # the library adds row after row in float32
    got = ops.gram(x)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert bool(((got.cpu().double() - expected).abs() <= tolerance * mass).all())
    again = ops.gram(x, out=got)
    assert again is got
    assert bool(((got.cpu().double() - 2 * expected).abs() <= 3 * tolerance * mass).all())


def test_gram_of_16_bit_activations_is_not_rounded_to_16_bits() -> None:
    x = torch.full((300, 1), 1.0, dtype=torch.bfloat16)  # 257 and more are not all bfloat16 numbers
    assert float(ops.gram(x)) == 300.0


def test_results_do_not_require_grad() -> None:
    x = torch.ones(2, 3, 4, requires_grad=True)
    assert not any(t.requires_grad for t in (*ops.channel_moments(x), ops.channel_dots(x, x), ops.gram(x)))
