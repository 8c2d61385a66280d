"""Salience from activations: against float64, against gradients of autograd, over dtypes, layouts and odd sizes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers_fresh import PACKAGE, run_fresh
from helpers_ops import DEVICES, FLOATS
from torch import Tensor, nn

from pyprune import ops
from pyprune.errors import PyPruneError
from pyprune.ops import activation, reference

FORMULAS = ["taylor_signed", "taylor_abs", "fisher", "mixed"]
compiled = pytest.mark.skipif(not ops.backend_info()["native"], reason="the package was installed without a compiler")

# (samples, tokens, in, out): single elements, sizes beside multiples of the tiles, several tiles either way, nothing.
SIZES = [
    (1, 1, 1, 1), (2, 5, 7, 3), (3, 20, 24, 40), (1, 33, 131, 129), (2, 65, 264, 136), (4, 31, 16, 300),
    (2, 32, 300, 8),
    (0, 5, 6, 4), (2, 0, 6, 4), (2, 5, 0, 4), (2, 5, 6, 0),
]  # fmt: skip


def layer(
    size: tuple[int, int, int, int], dtype: torch.dtype, device: str = "cpu", transposed: bool = False, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """(x, dy, weight) of normal numbers."""
    samples, tokens, inputs, outputs = size
    generator = torch.Generator().manual_seed(seed)
    shapes = [
        (samples, tokens, inputs), (samples, tokens, outputs), (inputs, outputs) if transposed else (outputs, inputs),
    ]  # fmt: skip
    return tuple(torch.randn(s, generator=generator).to(dtype).to(device) for s in shapes)  # type: ignore[return-value]


def assert_sums(got: tuple[Tensor, Tensor], args: tuple[Tensor, Tensor, Tensor], formula: str, **options: Any) -> None:
    """Each sum equals the float64 one within a few roundings of what its terms would be without cancellation."""
    wide = [t.detach().cpu().double() for t in args]
    expected = reference.activation_salience(*wide, formula, **options)
    magnitudes = [t.abs() for t in wide]
    parts = {"taylor_signed": ["taylor_abs"], "mixed": ["taylor_abs", "fisher"]}.get(formula, [formula])
    masses = [reference.activation_salience(*magnitudes, part, **options) for part in parts]
    for side in (0, 1):
        value, truth = got[side], expected[side]
        double = args[2].dtype == torch.float64
        assert value.dtype == (torch.float64 if double else torch.float32)
        assert value.device == args[2].device
        assert value.shape == truth.shape
        error = (value.cpu().double() - truth).abs()
        assert bool((error <= (1e-13 if double else 4e-6) * sum(m[side] for m in masses)).all()), formula


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("formula", FORMULAS)
def test_sums_match_float64_for_every_size(formula: str, dtype: torch.dtype, device: str) -> None:
    for size, transposed in itertools.product(SIZES, (False, True)):
        args = layer(size, dtype, device, transposed)
        options = {"transposed": transposed, "gradient_scale": 0.5, "curvature_scale": 0.25}
        assert_sums(ops.activation_salience(*args, formula, **options), args, formula, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("formula", FORMULAS)
def test_float64_keeps_its_precision(formula: str, device: str) -> None:
    args = layer((3, 20, 24, 40), torch.float64, device)
    assert_sums(ops.activation_salience(*args, formula), args, formula)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("formula", FORMULAS)
def test_it_equals_the_salience_of_the_gradients_that_autograd_computes(formula: str, device: str) -> None:
    """Both routes: a layer in a small network, each sample's own loss, means over samples."""
    samples = 4
    torch.manual_seed(0)
    linear, head = nn.Linear(37, 29, device=device), nn.Linear(29, 5, device=device)
    x = torch.randn(samples, 11, 37, device=device)
    seen: dict[str, Tensor] = {}
    g, h = torch.zeros_like(linear.weight), torch.zeros_like(linear.weight)
    rows = []
    for i in range(samples):
        y = linear(x[i : i + 1])
        y.register_hook(lambda grad: rows.append(grad))
        loss = head(torch.tanh(y)).logsumexp(-1).mean()
        linear.zero_grad()
        loss.backward()
        g += linear.weight.grad / samples
        h += linear.weight.grad**2 / samples
    seen["dy"] = torch.cat(rows)
    expected = ops.salience(formula, [linear.weight], [g], [h])
    got = ops.activation_salience(
        x, seen["dy"], linear.weight, formula, gradient_scale=1 / samples, curvature_scale=1 / samples
    )
    for side in (0, 1):
        torch.testing.assert_close(
            got[side], expected[side][0], rtol=1e-3, atol=1e-5 * float(expected[side][0].abs().max())
        )
        assert not got[side].requires_grad


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_views_of_any_layout_equal_their_contiguous_copies(dtype: torch.dtype, device: str) -> None:
    x, dy, weight = layer((4, 24, 80, 72), dtype, device)
    cases = [
        (x[:, :, 3:67], dy[:, :, 1:], weight[1:, 3:67]),
        (x[1:3, 2:], dy[1:3, 2:], weight),
        (x[::2, ::3], dy[::2, ::3], weight),
        (x.transpose(0, 1), dy.transpose(0, 1), weight),
        (x[..., ::2], dy[..., ::3], weight[::3, ::2]),
        (x[:1].expand(3, 24, 80), dy[1:], weight.t().contiguous().t()),
    ]
    for args in cases:
        got = ops.activation_salience(*args, "mixed")
        again = ops.activation_salience(*(t.contiguous() for t in args), "mixed")
        assert_sums(got, args, "mixed")
        for a, b in zip(got, again, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.max()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("formula", FORMULAS)
def test_two_calls_give_the_same_bits(formula: str, device: str) -> None:
    for dtype in FLOATS:
        args = layer((3, 100, 520, 390), dtype, device)
        first = ops.activation_salience(*args, formula)
        for _ in range(3):
            assert all(map(torch.equal, ops.activation_salience(*args, formula), first))


@pytest.mark.parametrize("device", DEVICES)
def test_padded_tokens_add_nothing(device: str) -> None:
    x, dy, weight = layer((2, 40, 24, 16), torch.float32, device)
    dy[0, 25:] = 0
    x[0, 25:] = 1e6
    alone = layer((2, 40, 24, 16), torch.float32, device)
    short = [
        ops.activation_salience(alone[0][:1, :25], alone[1][:1, :25], weight, "fisher"),
        ops.activation_salience(alone[0][1:], alone[1][1:], weight, "fisher"),
    ]
    for side, sums in enumerate(ops.activation_salience(x, dy, weight, "fisher")):
        torch.testing.assert_close(sums, short[0][side] + short[1][side])


@pytest.mark.parametrize("device", DEVICES)
def test_nan_in_an_input_channel_reaches_its_own_column_and_all_rows(device: str) -> None:
    x, dy, weight = layer((2, 20, 24, 16), torch.float32, device)
    x[1, 7, 5] = float("nan")
    rows, cols = ops.activation_salience(x, dy, weight, "taylor_abs")
    assert bool(rows.isnan().all())
    assert cols.isnan().nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("formula", FORMULAS)
def test_the_size_of_the_blocks_changes_the_sums_by_rounding_only(
    formula: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = layer((3, 20, 24, 40), torch.bfloat16)
    widths = []

    def counted(formula: str, weights: list[Tensor], grads: Any, curvatures: Any) -> Any:
        widths.append(weights[0].shape[0])
        return ops.salience(formula, weights, grads, curvatures)

    monkeypatch.setattr(activation, "salience", counted)
    monkeypatch.setattr(activation, "_fused", lambda device: False)
    whole = ops.activation_salience(*args, formula)
    assert widths == [40]
    widths.clear()
    monkeypatch.setattr(activation, "BLOCK_BYTES", 7 * 24 * 4)
    for a, b in zip(ops.activation_salience(*args, formula), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(whole[0].abs().max()))
    assert widths == [7, 7, 7, 7, 7, 5]


@compiled
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("formula", FORMULAS)
def test_the_kernel_of_the_cpu_agrees_with_blocks_of_gradients(
    formula: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More tokens than are multiplied at a time, more rows than one task takes, panels that are partly filled."""
    for size in [(3, 600, 50, 200), (2, 256, 48, 96), (5, 3, 97, 7)]:
        args = layer(size, dtype)
        fused = torch.ops.pyprune.activation_salience(*args, reference.FORMULAS[formula].code, False, 0.5, 0.25)
        with monkeypatch.context() as patched:
            patched.setattr(activation, "_fused", lambda device: False)
            blocks = ops.activation_salience(*args, formula, gradient_scale=0.5, curvature_scale=0.25)
        for a, b in zip(fused, blocks, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


@compiled
def test_the_number_of_threads_changes_no_bit() -> None:
    args = layer((2, 40, 130, 500), torch.float32)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(ops.activation_salience(*args, "mixed"))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))


@compiled
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_narrower_instruction_sets_agree_within_rounding(isa: str) -> None:
    if isa not in ops.backend_info()["build"]["cpu_isas"]:
        pytest.skip("not compiled for this processor family")
    code = (
        "import torch; from pyprune import ops; torch.manual_seed(0);"
        "x, dy, w = torch.randn(2, 20, 60), torch.randn(2, 20, 110), torch.randn(110, 60);"
        "ops.backend_info();"
        "r, c = torch.ops.pyprune.activation_salience(x, dy, w, 5, False, 1.0, 1.0);"
        "print(ops.backend_info()['cpu_isa'], *torch.cat([r, c]).tolist())"
    )
    done = run_fresh(code, cwd=PACKAGE, path=(PACKAGE,), PYPRUNE_CPU_ISA=isa)
    assert done.status == 0, done.err
    chosen, *values = done.out.split()
    if chosen != isa:
        pytest.skip("the processor does not have it")
    torch.manual_seed(0)
    x, dy, w = torch.randn(2, 20, 60), torch.randn(2, 20, 110), torch.randn(110, 60)
    expected = torch.cat(reference.activation_salience(x.double(), dy.double(), w.double(), "mixed"))
    torch.testing.assert_close(torch.tensor([float(v) for v in values]).double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "option"),
    [
        ({"formula": "abs"}, "formula"),
        ({"formula": "mixd"}, "formula"),
        ({"x": torch.ones(5, 6)}, "x"),
        ({"x": [1.0]}, "x"),
        ({"x": torch.ones(2, 5, 6, dtype=torch.bfloat16)}, "x"),
        ({"dy": torch.ones(2, 4, 3)}, "dy"),
        ({"dy": torch.ones(2, 5, 3, device="meta")}, "dy"),
        ({"weight": torch.ones(6, 3)}, "weight"),
        ({"weight": torch.ones(3, 6, 1)}, "weight"),
        ({"weight": torch.ones(3, 6, dtype=torch.int32)}, "weight"),
        ({"transposed": True}, "weight"),
    ],
)
def test_a_mistake_names_its_argument(change: dict[str, Any], option: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.ones(2, 5, 6), "dy": torch.ones(2, 5, 3), "weight": torch.ones(3, 6), "formula": "mixed",
    }  # fmt: skip
    ops.activation_salience(**arguments)
    with pytest.raises(PyPruneError) as caught:
        ops.activation_salience(**{**arguments, **change})
    assert caught.value.option == option


@compiled
def test_the_compiled_op_tells_its_shapes_without_data() -> None:
    x, dy, weight = (t.to("meta") for t in layer((2, 5, 6, 3), torch.bfloat16))
    rows, cols = torch.ops.pyprune.activation_salience(x, dy, weight, 4, False, 1.0, 1.0)
    assert (rows.shape, cols.shape) == ((3,), (6,))
    assert rows.dtype == cols.dtype == torch.float32


@compiled
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_opcheck_activation_salience(dtype: torch.dtype, device: str) -> None:
    args = layer((2, 5, 7, 3), dtype, device)
    torch.library.opcheck(torch.ops.pyprune.activation_salience.default, (*args, 5, False, 0.5, 0.25))
