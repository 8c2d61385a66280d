"""What only a GPU can show: streams, sizes beyond 32 bits, and the hardware's own arithmetic."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor, nn

from pyprune import discover, ops
from pyprune.importance.taps import _sums_by_place
from pyprune.ops import reference

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def room_for(gib: float) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of GPU memory, {free / 2**30:.1f} are free")


def layer(samples: int, tokens: int, inputs: int, outputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    shapes = [(samples, tokens, inputs), (samples, tokens, outputs), (outputs, inputs)]
    return tuple(torch.randn(s, device="cuda").to(dtype) for s in shapes)  # type: ignore[return-value]


@pytest.mark.parametrize("size", [(10, 128, 4096, 1024), (3, 100, 5000, 9000)], ids=["tokens", "tiles"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("formula", ["taylor_signed", "taylor_abs", "fisher", "mixed"])
def test_a_layer_of_a_real_size_matches_float64(
    formula: str, dtype: torch.dtype, size: tuple[int, int, int, int]
) -> None:
    """Sums over 1280 tokens, where the order and the rounding of the tensor cores must not show; more tiles than run at
    once, with ragged ends."""
    args = layer(*size, dtype)
    wide = [t.double() for t in args]
    expected = reference.activation_salience(*wide, formula, gradient_scale=0.1, curvature_scale=0.1)
    got = ops.activation_salience(*args, formula, gradient_scale=0.1, curvature_scale=0.1)
    for value, truth in zip(got, expected, strict=True):
        scale = float(truth.abs().max())
        assert float((value.double() - truth).abs().max()) <= 1e-4 * scale


@pytest.mark.skipif(os.environ.get("PYPRUNE_WGMMA") == "0", reason="products of four warps are turned off")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_four_warps_serve_where_the_hardware_has_them(dtype: torch.dtype) -> None:
    """Every other kernel gives the same sums, so that nothing else would tell."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("only compute capability 9.0 has them")
    args = layer(2, 128, 512, 512, dtype)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        ops.activation_salience(*args, "fisher")
        torch.cuda.synchronize()
    assert any("activation_pairs" in event.key for event in profile.key_averages())


@pytest.mark.parametrize("start", [8, 3], ids=["whole words", "any start"])
def test_infinity_outside_a_view_stays_outside(start: int) -> None:
    """A number of channels that fills no word, between others: copies end in the middle of one."""
    shapes, inputs, outputs = (
        ((2, 40, 320), (2, 40, 288), (288, 320)),
        slice(start, start + 266),
        slice(start, start + 262),
    )
    x, dy, weight = (torch.full(s, torch.inf, dtype=torch.bfloat16, device="cuda") for s in shapes)
    inner = (x[:, 1:39, inputs], dy[:, 1:39, outputs], weight[outputs, inputs])
    for t in inner:
        t.normal_()
    for formula in ("taylor_abs", "fisher", "mixed"):
        expected = reference.activation_salience(*(t.double() for t in inner), formula)
        for value, truth in zip(ops.activation_salience(*inner, formula), expected, strict=True):
            assert float((value.double() - truth).abs().max()) <= 1e-4 * float(truth.abs().max())


@pytest.mark.parametrize("size", [(4, 100, 1030, 770), (4, 100, 1032, 776)], ids=["any rows", "whole words"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("formula", ["taylor_abs", "fisher", "mixed"])
def test_repeats_give_the_same_bits_beside_other_work(
    formula: str, dtype: torch.dtype, size: tuple[int, int, int, int]
) -> None:
    args = layer(*size, dtype)
    first = ops.activation_salience(*args, formula)
    other = torch.randn(2048, 2048, device="cuda")
    stream = torch.cuda.Stream()
    for _ in range(5):
        with torch.cuda.stream(stream):
            other @ other
        assert all(map(torch.equal, ops.activation_salience(*args, formula), first))


def test_both_routes_give_the_same_scores_of_a_layer() -> None:
    x, dy, weight = layer(6, 40, 520, 390, torch.float32)
    each = torch.einsum("bto,bti->boi", dy.double(), x.double()).float()
    for formula in ("taylor_abs", "fisher", "mixed"):
        rows, cols = ops.salience(formula, [weight], [each.sum(0) / 6], [each.square().sum(0) / 6])
        got = ops.activation_salience(x, dy, weight, formula, gradient_scale=1 / 6, curvature_scale=1 / 6)
        torch.testing.assert_close(got[0], rows[0], rtol=1e-3, atol=1e-5 * float(rows[0].max()))
        torch.testing.assert_close(got[1], cols[0], rtol=1e-3, atol=1e-5 * float(cols[0].max()))


def test_work_on_a_side_stream_is_waited_for() -> None:
    """Inputs written on a stream are read by a kernel that is launched on it, with no synchronisation in between."""
    x, dy, weight = (torch.zeros(s, device="cuda") for s in ((1, 64, 1024), (1, 64, 512), (512, 1024)))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for t in (x, dy, weight):
            t.fill_(1.0)
        rows, cols = ops.activation_salience(x, dy, weight, "taylor_abs")
    stream.synchronize()
    assert bool((rows == 64.0 * 1024).all())
    assert bool((cols == 64.0 * 512).all())


def test_the_host_does_not_wait_for_the_kernel() -> None:
    args = layer(1, 64, 256, 256, torch.bfloat16)
    ops.activation_salience(*args, "fisher")
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)
    ops.activation_salience(*args, "fisher")
    assert not torch.cuda.current_stream().query()
    torch.cuda.synchronize()


def test_the_host_does_not_wait_for_long_tables() -> None:
    """Of 80 KB and more, each of its own, on their way behind other work."""
    source = torch.randn(40_000, 8, device="cuda")
    kept = [torch.randperm(len(source))[: 10_000 + 1000 * i] for i in range(4)]

    def call() -> list[Tensor]:
        return [ops.gather([source], [{0: places}])[0] for places in kept]

    call()  # takes all memory
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)
    got = call()
    assert not torch.cuda.current_stream().query()
    for result, places in zip(got, kept, strict=True):
        assert torch.equal(result.cpu(), source.cpu()[places])


def test_activations_of_more_than_two_to_the_31_elements() -> None:
    room_for(12)
    tokens = 2**31 // 4096 + 40
    x = torch.zeros(1, tokens, 4096, dtype=torch.bfloat16, device="cuda")
    dy = torch.zeros(1, tokens, 64, dtype=torch.bfloat16, device="cuda")
    x[0, -8:], dy[0, -8:] = 1.0, 2.0
    weight = torch.ones(64, 4096, dtype=torch.bfloat16, device="cuda")
    rows, cols = ops.activation_salience(x, dy, weight, "taylor_abs")
    assert bool((rows == 16.0 * 4096).all())
    assert bool((cols == 16.0 * 64).all())


def test_a_weight_of_more_than_two_to_the_31_elements() -> None:
    room_for(12)
    outputs = 2**31 // 4096 + 40
    weight = torch.ones(outputs, 4096, dtype=torch.bfloat16, device="cuda")
    x = torch.ones(2, 4, 4096, dtype=torch.bfloat16, device="cuda")
    dy = torch.ones(2, 4, outputs, dtype=torch.bfloat16, device="cuda")
    rows, cols = ops.activation_salience(x, dy, weight, "fisher")
    assert bool((rows == 32.0 * 4096).all())
    assert bool(((cols - 32.0 * outputs).abs() <= 1e-6 * 32.0 * outputs).all())
    del x, dy
    (kept,) = ops.gather([weight], [{0: [0, outputs - 1], 1: range(1, 4096, 3)}])
    assert kept.shape == (2, 1365) and bool((kept == 1).all())
    rows, _ = ops.salience("square", [weight])
    assert bool((rows[0] == 4096.0).all())


@pytest.mark.skipif(not hasattr(ops, "channel_dots"), reason="pyprune.ops has no channel sums")
@pytest.mark.parametrize("dtype", DTYPES)
def test_channel_sums_match_float64(dtype: torch.dtype) -> None:
    for shape in ((1, 1, 1), (3, 70, 24), (2, 1000, 4099), (0, 4, 5), (2, 0, 5)):
        a, b = (torch.randn(shape, device="cuda").to(dtype) for _ in range(2))
        wide, other = a.double(), b.double()
        dots = ops.channel_dots(a, b)
        assert dots.shape == (shape[0], shape[2]) and dots.dtype == torch.float32
        assert bool(((dots - (wide * other).sum(1)).abs() <= 2e-6 * (wide * other).abs().sum(1)).all())
        sums, squares = ops.channel_moments(a.flatten(0, 1))
        wide = wide.flatten(0, 1)
        assert bool(((sums - wide.sum(0)).abs() <= 2e-6 * wide.abs().sum(0)).all())
        assert bool(((squares - wide.square().sum(0)).abs() <= 2e-6 * wide.square().sum(0)).all())
        assert torch.equal(ops.channel_dots(a, b), dots)


def test_a_prepared_call_runs_on_a_side_stream_and_in_a_graph() -> None:
    weights = [torch.randn(300, 270, device="cuda").to(d) for d in DTYPES]
    sums = ops.prepare_salience("square", weights)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for w in weights:
            w.mul_(2)
        rows, cols = sums()
    side.synchronize()
    want = ops.salience("square", weights)
    assert all(map(torch.equal, (*rows, *cols), (*want[0], *want[1])))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows, cols = sums()
    for w in weights:
        w.mul_(0.5)
    graph.replay()
    want = ops.salience("square", weights)
    assert all(map(torch.equal, (*rows, *cols), (*want[0], *want[1])))


@pytest.mark.parametrize("count", [3, 400], ids=["one piece", "pieces"])
def test_calls_in_a_graph_read_no_host_memory_when_it_runs(count: int) -> None:
    """Tables that the arguments of one launch hold, and larger ones."""
    weights = [torch.randn(30, 70, device="cuda").to(DTYPES[i % 3]) for i in range(count)]
    curvatures, wanted = ([torch.zeros(30, 70, device="cuda") for _ in weights] for _ in range(2))
    kept = [{0: range(i % 5, 30, 3), 1: range(1, 70, 2)} for i in range(count)]

    def call(h: list[Tensor]) -> list[Tensor]:
        ops.accumulate_square_(h, weights, 0.5)
        rows, cols = ops.salience("fisher", weights, curvatures=h)
        return [*rows, *cols, *ops.gather(weights, kept)]

    call([h.clone() for h in curvatures])  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call(curvatures)
    other = [torch.full((n,), 255, dtype=torch.uint8) for n in range(16, 40_000, 16)]  # where the tables were
    for turn in range(2):
        for w in weights:
            w.mul_(0.5 + turn)
        graph.replay()
        assert all(map(torch.equal, got, call(wanted)))
        assert all(map(torch.equal, curvatures, wanted))
    del other


def test_sums_by_place_repeat_bit_for_bit() -> None:
    places = torch.randint(0, 50, (3, 20_000), device="cuda")
    values = torch.randn(3, 20_000, device="cuda")
    sums = _sums_by_place(places, values, 64)
    assert all(torch.equal(_sums_by_place(places, values, 64), sums) for _ in range(5))
    expected = _sums_by_place(places.cpu(), values.double().cpu(), 64)
    torch.testing.assert_close(sums.double().cpu(), expected, rtol=1e-4, atol=1e-3)


def test_a_model_that_needs_values_is_run_where_its_weights_are() -> None:
    class Chooses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.up, self.down = nn.Embedding(20, 8), nn.Linear(8, 12), nn.Linear(12, 8)

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embedding(input_ids)
            return self.down(self.up(x) if x.sum() < 1e9 else self.up(-x))

    groups = discover(Chooses().cuda())
    assert any(g.units == 12 and g.prunable for g in groups)
