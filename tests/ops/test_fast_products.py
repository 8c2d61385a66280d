"""Linear layers without gradients, by the faster of two libraries."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from pyprune import ops


def some(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7, 12), (2, 5, 12), (12,), (0, 12)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_is_the_linear_layer(shape: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
    x, w, b = some(*shape, dtype=dtype), some(9, 12, seed=1, dtype=dtype), some(9, seed=2, dtype=dtype)
    want = linear(x, w, b if bias else None)
    with torch.no_grad(), ops.fast_products():
        got = linear(x, w, b if bias else None)
        named = linear(input=x, weight=w, bias=b if bias else None)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(named, want, rtol=1e-5, atol=1e-5)


def test_gradients_are_recorded_where_they_are_wanted() -> None:
    x, w = some(7, 12), some(9, 12, seed=1).requires_grad_()
    with ops.fast_products():
        linear(x, w).sum().backward()
    assert w.grad is not None
    torch.testing.assert_close(w.grad, x.sum(0).expand(9, -1))


def test_shapes_that_do_not_fit_have_pytorchs_error() -> None:
    with torch.no_grad(), ops.fast_products(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(some(7, 12), some(9, 11))
