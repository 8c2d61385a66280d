"""Row and column sums of the salience: against float64, over dtypes, odd shapes and strides, and bit for bit."""

from __future__ import annotations

import pytest
import torch
from helpers_ops import DEVICES, FLOATS, FORMULAS, HALF, SHAPES, assert_salience, inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyprune import ops
from pyprune.ops import reference


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("formula", FORMULAS)
def test_sums_match_float64_for_every_shape_in_one_call(formula: str, dtype: torch.dtype, device: str) -> None:
    weights, grads, curvatures = inputs(SHAPES, dtype, device)
    assert_salience(formula, weights, grads, curvatures, ops.salience(formula, weights, grads, curvatures))


@pytest.mark.parametrize("formula", FORMULAS)
def test_float64_weights_give_float64_sums(formula: str) -> None:
    weights, grads, curvatures = inputs(SHAPES, torch.float64)
    assert_salience(formula, weights, grads, curvatures, ops.salience(formula, weights, grads, curvatures))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("formula", ["taylor_signed", "taylor_abs", "mixed"])
def test_float32_gradients_beside_16_bit_weights_keep_their_precision(
    formula: str, dtype: torch.dtype, device: str
) -> None:
    weights, grads, curvatures = inputs(SHAPES, dtype, device, grad_dtype=torch.float32)
    assert_salience(formula, weights, grads, curvatures, ops.salience(formula, weights, grads, curvatures))


@pytest.mark.parametrize("device", DEVICES)
def test_a_call_may_mix_dtypes(device: str) -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.bfloat16]
    sets = [inputs([(50, 70)], dtype, device, seed=i) for i, dtype in enumerate(dtypes)]
    weights, grads, curvatures = ([s[k][0] for s in sets] for k in range(3))
    assert_salience("mixed", weights, grads, curvatures, ops.salience("mixed", weights, grads, curvatures))


@pytest.mark.parametrize("dtype", HALF)
def test_every_16_bit_value_is_widened_exactly(dtype: torch.dtype) -> None:
    """All 65536 bit patterns, subnormals and infinities among them; NaN stays NaN."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    rows, _ = ops.salience("abs", [every.reshape(-1, 1).expand(-1, 16)[:, :1].contiguous()])
    expected = every.float().abs()
    assert torch.equal(rows[0].isnan(), expected.isnan())
    finite = ~expected.isnan()
    assert torch.equal(rows[0][finite], expected[finite])
    wide_rows, _ = ops.salience("abs", [every.reshape(4096, 16)])
    assert torch.equal(wide_rows[0].isnan(), expected.reshape(4096, 16).isnan().any(1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_views_of_any_layout_equal_their_contiguous_copies(dtype: torch.dtype, device: str) -> None:
    base, grad_base, curvature_base = (t[0] for t in inputs([(64, 200)], dtype, device))
    deep, deep_grad, deep_curvature = (t[0] for t in inputs([(6, 20, 33)], dtype, device, seed=1))

    def views(t: Tensor, d: Tensor) -> list[Tensor]:
        return [
            t[:, 3:190], t[1:, 1:], t[::3], t[:, ::2], t.t(), t[5], t[:, 7], t[10:20].t(), t[:1].expand(30, 200),
            d.transpose(0, 1), d.permute(2, 1, 0), d[:, :, 1:], d[::2, 1:, 5:30], d[:, 3],
        ]  # fmt: skip

    args = views(base, deep), views(grad_base, deep_grad), views(curvature_base, deep_curvature)
    got = ops.salience("mixed", *args)
    copies = ops.salience("mixed", *([t.contiguous() for t in a] for a in args))
    for a, b in zip(got[0] + got[1], copies[0] + copies[1], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("device", DEVICES)
def test_row_strided_inputs_are_read_in_place(device: str) -> None:
    """A view of a much larger tensor must not be copied: the call's memory stays that of its sums."""
    wide = torch.zeros(4, 1 << 20, dtype=torch.bfloat16, device=device)
    view = wide[:, 5 : 5 + (1 << 19)]
    assert not view.is_contiguous()
    before = view.data_ptr()
    rows, _ = ops.salience("abs", [view])
    wide[2, 5] = 3.0
    assert float(ops.salience("abs", [view])[0][0][2]) == 3.0
    assert float(rows[0][2]) == 0.0
    assert view.data_ptr() == before


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_two_calls_give_the_same_bits(dtype: torch.dtype, device: str) -> None:
    weights, grads, curvatures = inputs([(700, 5000), (3000, 100), (1, 9), (5, 130, 40)], dtype, device)
    first = ops.salience("mixed", weights, grads, curvatures)
    for _ in range(3):
        again = ops.salience("mixed", weights, grads, curvatures)
        for a, b in zip(first[0] + first[1], again[0] + again[1], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("device", DEVICES)
def test_a_tensor_alone_or_among_others_gives_the_same_bits(device: str) -> None:
    weights, grads, _ = inputs([(700, 500), (33, 20), (300, 2100)], torch.bfloat16, device)
    together = ops.salience("taylor_abs", weights, grads)
    for i in range(3):
        alone = ops.salience("taylor_abs", weights[i : i + 1], grads[i : i + 1])
        assert torch.equal(alone[0][0], together[0][i])
        assert torch.equal(alone[1][0], together[1][i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    weights, grads, curvatures = inputs([(700, 5000), (3000, 100), (257, 257), (9, 130, 40)], dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(ops.salience("mixed", weights, grads, curvatures))
    finally:
        torch.set_num_threads(before)
    for rows, cols in results[1:]:
        for a, b in zip(rows + cols, results[0][0] + results[0][1], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("device", DEVICES)
def test_signed_sums_keep_their_sign(device: str) -> None:
    weight = torch.tensor([[1.0, -2.0], [3.0, 4.0]], device=device)
    grad = torch.tensor([[1.0, 1.0], [-1.0, 0.5]], device=device)
    rows, cols = ops.salience("taylor_signed", [weight], [grad])
    assert rows[0].tolist() == [-1.0, -1.0]
    assert cols[0].tolist() == [-2.0, 0.0]


@pytest.mark.parametrize("device", DEVICES)
def test_a_vector_is_one_column(device: str) -> None:
    rows, cols = ops.salience("square", [torch.tensor([1.0, 2.0, 3.0], device=device)])
    assert rows[0].tolist() == [1.0, 4.0, 9.0]
    assert cols[0].tolist() == [14.0]


@pytest.mark.parametrize("device", DEVICES)
def test_nan_reaches_its_own_row_and_column_only(device: str) -> None:
    weight = torch.ones(40, 50, device=device)
    weight[7, 11] = float("nan")
    rows, cols = ops.salience("abs", [weight])
    assert rows[0].isnan().nonzero().flatten().tolist() == [7]
    assert cols[0].isnan().nonzero().flatten().tolist() == [11]


@pytest.mark.parametrize("device", DEVICES)
def test_weights_that_require_grad_give_sums_that_do_not(device: str) -> None:
    weight = torch.nn.Parameter(torch.ones(3, 4, device=device))
    for t in ops.salience("taylor_abs", [weight], [torch.ones(3, 4, device=device)]):
        assert not t[0].requires_grad


@pytest.mark.parametrize("device", DEVICES)
def test_offsets_beyond_two_to_the_31_elements(device: str) -> None:
    far = 2**31 + 8
    big = torch.empty(far + 64, dtype=torch.bfloat16, device=device)  # untouched pages take no memory
    view = big.as_strided((2, 64), (far, 1))
    view[0], view[1] = 1.0, 2.0
    rows, cols = ops.salience("abs", [view])
    assert rows[0].tolist() == [64.0, 128.0]
    assert cols[0].tolist() == [3.0] * 64


def test_no_tensors_give_no_sums() -> None:
    assert ops.salience("abs", []) == ([], [])


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_view_of_any_dtype_matches_float64(data: st.DataObject) -> None:
    formula = data.draw(st.sampled_from(FORMULAS))
    dtype = data.draw(st.sampled_from([*FLOATS, torch.float64]))
    weights, grads, curvatures = [], [], []
    for i in range(data.draw(st.integers(1, 4))):
        dims = data.draw(st.integers(1, 3))
        limit = {1: 3000, 2: 180, 3: 24}[dims]
        shape = tuple(data.draw(st.integers(0, limit)) for _ in range(dims))
        order = data.draw(st.permutations(range(dims)))
        cuts = tuple(slice(data.draw(st.integers(0, 3)), None, data.draw(st.integers(1, 3))) for _ in range(dims))
        for tensors, made in zip((weights, grads, curvatures), inputs([shape], dtype, seed=i), strict=True):
            tensors.append(made[0][cuts].permute(*order))
    assert_salience(formula, weights, grads, curvatures, ops.salience(formula, weights, grads, curvatures))


@pytest.mark.parametrize("formula", FORMULAS)
def test_the_reference_itself_is_the_written_formula(formula: str) -> None:
    """Guards the definition: plain Python arithmetic on a 2 x 2 example."""
    w, g, h = [[1.0, -2.0], [3.0, 0.5]], [[-4.0, 1.0], [0.5, 2.0]], [[1.0, 2.0], [3.0, 4.0]]
    written = {
        "abs": lambda a, b, c: abs(a),
        "square": lambda a, b, c: a * a,
        "taylor_signed": lambda a, b, c: a * b,
        "taylor_abs": lambda a, b, c: abs(a * b),
        "fisher": lambda a, b, c: a * a * c,
        "mixed": lambda a, b, c: abs(a * b - 0.5 * a * a * c),
    }[formula]
    element = [[written(w[i][j], g[i][j], h[i][j]) for j in range(2)] for i in range(2)]
    rows, cols = reference.salience(formula, [torch.tensor(w)], [torch.tensor(g)], [torch.tensor(h)])
    assert rows[0].tolist() == [sum(r) for r in element]
    assert cols[0].tolist() == [element[0][j] + element[1][j] for j in range(2)]
