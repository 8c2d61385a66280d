"""The CUDA kernels' own code, run on the CPU: indices, bounds, fragment layouts, barriers, and the order of sums."""

from __future__ import annotations

import ctypes
import itertools
from pathlib import Path

import helpers_emulation as emulation
import numpy as np
import pytest
import torch
from helpers_emulation import assert_activation, layer
from helpers_ops import FLOATS, assert_salience, inputs

from pyprune.ops import reference

pytestmark = pytest.mark.skipif(emulation.compiler() is None, reason="there is no C++ compiler")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("formula", ["taylor_signed", "taylor_abs", "fisher", "mixed"])
def test_salience_from_activations_matches_float64(formula: str, dtype: torch.dtype, library: ctypes.CDLL) -> None:
    """Less than a tile, ragged tiles, several tiles either way; aligned rows and rows of odd length."""
    for size in ((1, 1, 1, 1), (2, 5, 7, 3), (3, 20, 24, 40), (1, 33, 131, 129), (2, 65, 264, 136)):
        x, dy, weight = layer(*size, dtype)
        assert_activation(library, x, dy, weight, formula)
        if weight.numel() < 30_000 or formula == "mixed":  # the last size takes the emulator seconds: the others below
            assert_activation(library, x, dy, weight.t().contiguous(), formula, transposed=True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("formula", ["taylor_signed", "taylor_abs", "fisher"])
def test_transposed_weights_of_several_tiles_match_float64(
    formula: str, dtype: torch.dtype, library: ctypes.CDLL
) -> None:
    x, dy, weight = layer(2, 65, 264, 136, dtype)
    assert_activation(library, x, dy, weight.t().contiguous(), formula, transposed=True)


@pytest.mark.parametrize("dtype", FLOATS)
def test_salience_from_activations_reads_views_in_place(dtype: torch.dtype, library: ctypes.CDLL) -> None:
    """Unaligned starts and row lengths, gaps between tokens and samples, samples that are not one after the other."""
    x, dy, weight = layer(4, 40, 80, 72, dtype)
    assert_activation(library, x[:, :, 3:67], dy[:, :, 1:], weight[1:, 3:67], "mixed")
    assert_activation(library, x[::2, ::3], dy[::2, ::3], weight, "fisher")
    assert_activation(library, x[1:, 2:], dy[1:, 2:], weight, "taylor_abs")
    assert_activation(library, x.transpose(0, 1), dy.transpose(0, 1), weight, "taylor_signed")
    assert_activation(library, x[:1].expand(3, 40, 80), dy[1:], weight, "fisher")


def test_salience_from_activations_of_nothing_is_zero(library: ctypes.CDLL) -> None:
    for size in ((0, 5, 6, 4), (2, 0, 6, 4), (2, 5, 0, 4), (2, 5, 6, 0)):
        for sums in emulation.activation_salience(library, *layer(*size, torch.bfloat16), "mixed", False, (1.0, 1.0)):
            assert sums.tolist() == [0.0] * len(sums)


def test_infinity_outside_a_view_stays_outside(library: ctypes.CDLL) -> None:
    """What shares sixteen bytes with wanted elements, or lies in a tile beyond the edge, must not leak into sums."""
    x, dy, weight = (torch.full(s, torch.inf) for s in ((2, 20, 80), (2, 20, 72), (72, 80)))
    inner = (x[:, 1:19, 3:67], dy[:, 1:19, 5:66], weight[5:66, 3:67])
    for t in inner:
        t.normal_()
    for formula in ("taylor_abs", "mixed"):
        assert_activation(library, *inner, formula)


@pytest.mark.parametrize("dtype", FLOATS)
def test_channel_sums_match_float64(dtype: torch.dtype, library: ctypes.CDLL) -> None:
    """Over sizes, several tiles of tokens, rows of odd length and views; and nothing at all."""
    for size in ((1, 1, 1), (2, 5, 7), (3, 70, 24), (1, 300, 300), (2, 33, 257), (2, 0, 5)):
        a, b = (torch.randn(size).to(dtype) for _ in range(2))
        views = [(a, b), (a[:, 1:, 1:], b[:, 1:, 1:]), (a[:, ::2], b[:, ::2]), (a.transpose(0, 1), b.transpose(0, 1))]
        for left, right in views:
            if left.numel() == 0:
                continue
            wide, other = left.double(), right.double()
            dots, _ = emulation.channel_sums(library, left, right)
            mass = (wide * other).abs().sum(1)
            assert bool(((dots.double() - (wide * other).sum(1)).abs() <= 1e-6 * mass).all())
            sums, squares = emulation.channel_sums(library, left, None)
            assert bool(((sums.double() - wide.sum((0, 1))).abs() <= 1e-6 * wide.abs().sum((0, 1))).all())
            assert bool(
                ((squares.double() - wide.square().sum((0, 1))).abs() <= 1e-6 * wide.square().sum((0, 1))).all()
            )


def test_channel_sums_over_many_tokens_use_several_rounds_a_tile(library: ctypes.CDLL) -> None:
    a = torch.randn(40, 1100, 5)
    sums, squares = emulation.channel_sums(library, a, None)
    torch.testing.assert_close(sums, a.double().sum((0, 1)).float(), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(squares, a.double().square().sum((0, 1)).float(), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("formula", sorted(reference.FORMULAS))
def test_salience_from_gradients_matches_float64(formula: str, dtype: torch.dtype, library: ctypes.CDLL) -> None:
    """Tensors with ragged ends beside aligned ones, several tiles either way, and views, in one launch."""
    weights, grads, curvatures = inputs([(5, 7), (16, 256), (33, 300), (530, 17), (3, 600), (64, 264)], dtype)
    for tensors in (weights, grads, curvatures):
        tensors += [tensors[2][1:, 1:], tensors[2][::3, 5:], tensors[5][:, 3:131]]
    got = emulation.salience(library, formula, weights, grads, curvatures)
    assert_salience(formula, weights, grads, curvatures, got)


def test_repeats_of_every_kernel_give_the_same_bits(library: ctypes.CDLL) -> None:
    x, dy, weight = layer(2, 40, 140, 130, torch.bfloat16)
    runs = [
        (
            *emulation.activation_salience(library, x, dy, weight, "mixed", False, (1.0, 1.0)),
            *emulation.channel_sums(library, x, None),
            *itertools.chain(*emulation.salience(library, "abs", [weight], [weight], [weight.float()])),
        )
        for _ in range(2)
    ]
    assert all(map(torch.equal, *runs))


@pytest.mark.slow
def test_the_emulator_notices_a_missing_barrier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of the check: without the barriers of the main loop the sums come out wrong."""
    good, bad = "__syncthreads();  // this step's", "// this step's"
    library = emulation.build_changed(tmp_path, monkeypatch, "activation_tile.cuh", good, bad)
    x, dy, weight = layer(3, 70, 140, 130, torch.bfloat16)
    rows, _ = emulation.activation_salience(library, x, dy, weight, "fisher", False, (1.0, 1.0))
    expected, _ = reference.activation_salience(x, dy, weight, "fisher")
    assert not torch.allclose(rows, expected, rtol=1e-3)


def test_one_call_serves_many_tensors_of_every_pair_of_dtypes(library: ctypes.CDLL) -> None:
    """Five launches from one table; tensors of one tile and of several."""
    pairs = [(d, d) for d in FLOATS] + [(d, torch.float32) for d in FLOATS[1:]]
    sets = [inputs([(3, 5), (2, 600), (520, 4)] * 4, d, grad_dtype=g, seed=i) for i, (d, g) in enumerate(pairs)]
    weights, grads, curvatures = ([t for s in sets for t in s[k]] for k in range(3))
    got = emulation.salience(library, "mixed", weights, grads, curvatures)
    assert_salience("mixed", weights, grads, curvatures, got)


def test_a_prepared_call_reads_what_the_tensors_hold_at_each_launch(library: ctypes.CDLL) -> None:
    pairs = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)]
    sets = [inputs([(3, 5), (2, 600), (520, 4)], d, grad_dtype=g, seed=i) for i, (d, g) in enumerate(pairs)]
    weights, grads, curvatures = ([t for s in sets for t in s[k]] for k in range(3))
    call = emulation.prepared_salience(library, "mixed", weights, grads, curvatures)
    assert_salience("mixed", weights, grads, curvatures, call())
    for tensors in (weights, grads, curvatures):
        for i, t in enumerate(tensors):
            t.mul_(0.5 + i)
    assert_salience("mixed", weights, grads, curvatures, call())


@pytest.mark.parametrize("count", [1, 120], ids=["one piece", "pieces"])
def test_a_graph_holds_all_that_its_calls_read_of_host_memory(count: int, library: ctypes.CDLL) -> None:
    """Tables that the arguments of one launch hold, and larger ones; what is not the graph's is gone when it runs."""
    shapes = [(3, 5), (9, 70), (2, 300)]
    weights, grads, curvatures = inputs([shapes[i % 3] for i in range(count)], torch.float32)
    was = [h.clone() for h in curvatures]
    kept = [np.arange(i % 2, w.shape[1], 2) for i, w in enumerate(weights)]
    places = [torch.full((w[:, k].numel() * 4,), 255, dtype=torch.uint8) for w, k in zip(weights, kept, strict=True)]
    with emulation.captured(library) as replay:
        emulation.accumulate_square(library, curvatures, grads, 0.5)
        call = emulation.prepared_salience(library, "mixed", weights, grads, curvatures)  # has the workspace
        sums = call()
        emulation.gather(
            library, [(w[None], [None, None, k], p) for w, k, p in zip(weights, kept, places, strict=True)]
        )
    assert all(map(torch.equal, curvatures, was))
    for _ in range(2):
        replay()
        was = [h + 0.5 * (g * g) for h, g in zip(was, grads, strict=True)]
        assert all(map(torch.equal, curvatures, was))
        assert_salience("mixed", weights, grads, curvatures, sums)
        for w, k, p in zip(weights, kept, places, strict=True):
            assert torch.equal(p.view(torch.float32), w[:, k].flatten())
        for i, (w, g) in enumerate(zip(weights, grads, strict=True)):
            w.mul_(0.5 + i), g.add_(1.0)


def test_long_tables_go_by_page_locked_memory(library: ctypes.CDLL) -> None:
    """Of 72 KB and then of more, in all of its parts."""
    for length in (9000, 9000, 9000, 9000, 20_000):
        source, kept = torch.randn(length, 3), np.random.default_rng(length).permutation(length)
        place = torch.empty(source.numel() * 4, dtype=torch.uint8)
        emulation.gather(library, [(source[None], [None, kept, None], place)])
        assert torch.equal(place.view(torch.float32), source[torch.from_numpy(kept)].flatten())


@pytest.mark.slow
def test_the_emulator_notices_page_locked_memory_that_is_written_too_soon(
    tmp_path: Path, library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five calls are prepared before the first is launched: one more than there are parts of that memory."""

    def assert_all_arrive(library: ctypes.CDLL) -> None:
        given = [inputs([(3 + i, 5)] * 420, torch.float32, seed=i) for i in range(5)]
        calls = [emulation.prepared_salience(library, "mixed", *tensors) for tensors in given]
        for tensors, call in zip(given, calls, strict=True):
            assert_salience("mixed", *tensors, call())

    assert_all_arrive(library)
    good, bad = "if (cudaEventSynchronize(slot.sent) != cudaSuccess) return false;", ""
    broken = emulation.build_changed(tmp_path, monkeypatch, "workspace.cu", good, bad)
    with pytest.raises(AssertionError):
        assert_all_arrive(broken)


@pytest.mark.slow
def test_the_emulator_notices_a_table_that_a_graph_would_read_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = "if (capture == cudaStreamCaptureStatusNone)", ""
    library = emulation.build_changed(tmp_path, monkeypatch, "workspace.cu", good, bad)
    _, grads, curvatures = inputs([(3, 5)] * 120, torch.float32)
    emulation.accumulate_square(library, curvatures, grads, 0.5)
    with emulation.captured(library), pytest.raises(AssertionError):
        emulation.accumulate_square(library, curvatures, grads, 0.5)
