"""The running diagonal of the Fisher matrix: in place, every dtype, every layout."""

from __future__ import annotations

import pytest
import torch
from helpers_ops import DEVICES, FLOATS, SHAPES, inputs
from hypothesis import given, settings
from hypothesis import strategies as st

from pyprune import ops
from pyprune.ops import accumulate


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_adds_the_scaled_square_in_place(dtype: torch.dtype, device: str) -> None:
    _, grads, curvatures = inputs([*SHAPES, (100_003,)], dtype, device)
    before = [h.double().clone() for h in curvatures]
    places = [h.data_ptr() for h in curvatures]
    ops.accumulate_square_(curvatures, grads, scale=0.3)
    for h, old, g, place in zip(curvatures, before, grads, places, strict=True):
        expected = old + 0.3 * g.double() ** 2
        assert h.data_ptr() == place
        torch.testing.assert_close(h.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_repeated_calls_make_the_mean_of_squares(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randn(30, 40, generator=generator).to(device) for _ in range(5)]
    h = torch.zeros(30, 40, device=device)
    for g in samples:
        ops.accumulate_square_([h], [g], scale=1 / 5)
    torch.testing.assert_close(h, torch.stack(samples).square().mean(0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_views_on_either_side_are_handled(dtype: torch.dtype, device: str) -> None:
    _, grads, curvatures = inputs([(40, 50), (40, 50), (50, 40), (41, 50)], dtype, device)
    targets = [curvatures[0][:, 5:21], curvatures[1].t(), curvatures[2][3:], curvatures[3].view(-1)[3:1003]]
    sources = [grads[0][:, 7:23], grads[1].t(), grads[2][:47], grads[3].view(-1)[5:1005]]
    untouched = curvatures[0][:, :5].clone()
    expected = [h.double() + 0.5 * g.double() ** 2 for h, g in zip(targets, sources, strict=True)]
    ops.accumulate_square_(targets, sources, scale=0.5)
    for h, e in zip(targets, expected, strict=True):
        torch.testing.assert_close(h.double(), e, rtol=1e-6, atol=0)
    assert torch.equal(curvatures[0][:, :5], untouched)


def test_a_curvature_that_is_named_twice_takes_both() -> None:
    h, grads = torch.zeros(300_000), [torch.full((300_000,), float(i)) for i in (1, 2, 3)]
    ops.accumulate_square_([h] * 3, grads, scale=2.0)
    assert bool((h == 28.0).all())


def test_the_number_of_threads_changes_no_bit() -> None:
    _, grads, curvatures = inputs([(700, 500), (3, 5), (200_001,)], torch.bfloat16)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 8):
            torch.set_num_threads(threads)
            copies = [h.clone() for h in curvatures]
            ops.accumulate_square_(copies, grads, scale=0.1)
            results.append(copies)
    finally:
        torch.set_num_threads(before)
    for copies in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(copies, results[0], strict=True))


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_any_views_of_any_dtype_match_float64(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([*FLOATS, torch.float64]))
    scale = data.draw(st.floats(-2, 2, width=32))
    targets, sources = [], []
    for i in range(data.draw(st.integers(1, 3))):
        dims = data.draw(st.integers(1, 3))
        shape = tuple(data.draw(st.integers(0, {1: 2000, 2: 60, 3: 14}[dims])) for _ in range(dims))
        _, (grad,), (curvature,) = inputs([shape], dtype, seed=i)
        cuts = tuple(slice(data.draw(st.integers(0, 3)), None, data.draw(st.integers(1, 3))) for _ in range(dims))
        order = data.draw(st.permutations(range(dims)))
        sources.append(grad[cuts].permute(*order))
        targets.append((curvature[cuts] if data.draw(st.booleans()) else curvature[cuts].clone()).permute(*order))
    expected = [h.double() + scale * g.double() ** 2 for h, g in zip(targets, sources, strict=True)]
    mass = [h.double() + abs(scale) * g.double() ** 2 for h, g in zip(targets, sources, strict=True)]
    ops.accumulate_square_(targets, sources, scale)
    for h, e, m in zip(targets, expected, mass, strict=True):
        assert bool(((h.double() - e).abs() <= 1e-6 * m).all())


def test_empty_curvatures_take_no_calls_of_their_own(monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(accumulate, "_rounds", lambda numbers, _: calls.append(list(numbers)) or [])
    empty = [torch.empty(0, 3) for _ in range(50)]
    ops.accumulate_square_(empty, [torch.empty(0, 3) for _ in range(50)])
    assert calls == [[]]
