"""Salience of the same tensors again and again."""

from __future__ import annotations

import sys
from itertools import chain
from types import FrameType
from typing import Any

import pytest
import torch
from helpers_ops import DEVICES, FLOATS, FORMULAS, SHAPES, assert_salience, inputs

from pyprune import ops
from pyprune.errors import PyPruneError
from pyprune.ops import _native


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("formula", FORMULAS)
def test_every_call_gives_the_sums_of_what_the_tensors_hold_by_then(
    formula: str, dtype: torch.dtype, device: str
) -> None:
    lists = inputs(SHAPES, dtype, device)
    sums = ops.prepare_salience(formula, *lists)
    for factor in (1.0, 0.5, 2.0):
        for t in chain(*lists):
            t.mul_(factor)
        got = sums()
        assert_salience(formula, *lists, got)
        assert all(map(torch.equal, chain(*got), chain(*ops.salience(formula, *lists))))


@pytest.mark.parametrize("device", DEVICES)
def test_a_prepared_call_may_mix_dtypes_and_strided_rows(device: str) -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
    sets = [inputs([(50, 70)], dtype, device, seed=i) for i, dtype in enumerate(dtypes)]
    weights, grads, curvatures = ([s[k][0][::2, 3:] for s in sets] for k in range(3))
    assert_salience("mixed", weights, grads, curvatures, ops.prepare_salience("mixed", weights, grads, curvatures)())


def test_without_a_compiled_library_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    lists = inputs([(5, 7), (3,)], torch.float32)
    monkeypatch.setattr(_native, "runs_on", lambda device: False)
    sums = ops.prepare_salience("mixed", *lists)
    for _ in range(2):
        lists[0][0].add_(1)
        assert_salience("mixed", *lists, sums())


def test_the_tensors_live_as_long_as_the_call() -> None:
    sums = ops.prepare_salience("abs", [torch.ones(64, 64)])
    others = [torch.full((64, 64), 7.0) for _ in range(64)]  # in memory that was given back, had it been
    rows, _ = sums()
    assert bool((rows[0] == 64).all()) and len(others) == 64


def test_training_gradients_can_be_scored_as_they_come() -> None:
    layer = torch.nn.Linear(6, 4)
    layer(torch.randn(3, 6)).sum().backward()
    assert layer.weight.grad is not None
    sums = ops.prepare_salience("taylor_abs", [layer.weight], [layer.weight.grad])
    for _ in range(2):
        layer.zero_grad(set_to_none=False)
        layer(torch.randn(3, 6)).square().sum().backward()
        rows, cols = sums()
        want = (layer.weight * layer.weight.grad).abs().detach()
        torch.testing.assert_close(rows[0], want.sum(1))
        torch.testing.assert_close(cols[0], want.sum(0))


def test_a_call_takes_no_more_python_for_many_tensors_than_for_few() -> None:
    def steps(count: int) -> int:
        sums = ops.prepare_salience("taylor_abs", [torch.ones(2, 2)] * count, [torch.ones(2, 2)] * count)
        seen = 0

        def trace(frame: FrameType, event: str, argument: Any) -> None:
            nonlocal seen
            seen += event in ("call", "c_call")

        sums()
        sys.setprofile(trace)
        try:
            sums()
        finally:
            sys.setprofile(None)
        return seen

    if not ops.backend_info()["native"]:
        pytest.skip("the package was installed without a compiler")
    assert steps(1000) == steps(2)


def test_what_cannot_be_read_in_place_is_refused() -> None:
    plain, turned = torch.ones(3, 4), torch.ones(4, 3).t()
    with pytest.raises(PyPruneError, match=r"weights\[1\] .*columns that are no neighbours in memory"):
        ops.prepare_salience("abs", [plain, turned])
    with pytest.raises(PyPruneError, match=r"grads\[0\] .*columns that are no neighbours in memory"):
        ops.prepare_salience("taylor_abs", [plain], [turned])
    with pytest.raises(PyPruneError, match="grads: is needed by formula 'taylor_abs'"):
        ops.prepare_salience("taylor_abs", [plain])


def test_the_compiled_call_itself_refuses_columns_that_are_no_neighbours() -> None:
    if not ops.backend_info()["native"]:
        pytest.skip("the package was installed without a compiler")
    with pytest.raises(RuntimeError, match="columns must be neighbours"):
        torch.ops.pyprune.salience_prepare([torch.ones(4, 3).t()], [], [], 0)


def test_a_tensor_negated_by_a_mark_is_refused() -> None:
    """Its numbers are not what lies in memory, and a copy would be gone when it is read."""
    weight = torch.randn(4, 5)._neg_view()
    with pytest.raises(PyPruneError, match=r"weights\[0\].*resolve_neg"):
        ops.prepare_salience("taylor_signed", [weight], [torch.randn(4, 5)])
