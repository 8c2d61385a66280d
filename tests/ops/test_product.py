"""The product is the same whichever library computes it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyprune.ops import product
from pyprune.ops import product as function
from pyprune.ops.product import _onednn, fast_bf16, is_faster

SIZE = st.integers(0, 40)


@pytest.fixture(params=["as here", "onednn", "mkl"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    import sys

    if request.param != "as here":
        monkeypatch.setattr(sys.modules[function.__module__], "_onednn", lambda: request.param == "onednn")
    if request.param == "onednn" and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this PyTorch has no oneDNN")
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True), (True, True)])
def test_it_is_a_times_b_transposed_in_any_strides(library: str, dtype: torch.dtype, transposed: tuple) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*shape, generator=generator) for shape in ((3, 17, 29), (23, 29)))
    a = (a.transpose(1, 2).contiguous().transpose(1, 2) if transposed[0] else a).to(dtype)
    b = (b.t().contiguous().t() if transposed[1] else b).to(dtype)
    got = product(a, b)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got.double(), a.double() @ b.double().t(), rtol=tolerance, atol=20 * tolerance)
    assert got.dtype == dtype and torch.equal(got, product(a, b))


@settings(max_examples=40, deadline=None)
@given(m=SIZE, n=SIZE, k=SIZE)
def test_any_sizes_give_what_matmul_gives(m: int, n: int, k: int) -> None:
    a, b = torch.randn(m, k), torch.randn(n, k)
    torch.testing.assert_close(product(a, b), a @ b.t(), rtol=1e-4, atol=1e-4)


def test_a_slice_of_a_larger_matrix_is_read_in_place(library: str) -> None:
    a, b = torch.randn(20, 60), torch.randn(20, 33)
    torch.testing.assert_close(product(a[:, 7:31].t(), b.t()), a[:, 7:31].t() @ b, rtol=1e-5, atol=1e-5)


def test_nothing_but_float32_on_the_cpu_leaves_pytorchs_own_way() -> None:
    assert not is_faster(torch.ones(2, 2, dtype=torch.bfloat16)) and not is_faster(torch.ones(2, 2, device="meta"))
    assert is_faster(torch.ones(2, 2)) == _onednn()


@pytest.mark.parametrize(("a", "b"), [((4, 8), (2, 3, 8)), ((4, 8), (3, 8, 1)), ((4, 3), (5, 3, 7)), ((4, 8), (3, 7))])
def test_matrices_that_do_not_fit_are_an_error(a, b) -> None:
    with pytest.raises(RuntimeError):
        product(torch.randn(a), torch.randn(b))


@pytest.mark.parametrize("there", [True, False])
def test_whether_bfloat16_is_fast_is_known_without_a_list_of_capabilities_too(there, monkeypatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)  # torch 2.10 has none
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: there)
    assert fast_bf16(torch.device("cpu")) is there
