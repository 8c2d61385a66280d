"""The kernel for compute capability 9.0, run on the CPU: panels and their descriptions, the ring, pairs, sums."""

from __future__ import annotations

import ctypes
from pathlib import Path

import helpers_emulation as emulation
import pytest
import torch
from helpers_emulation import assert_activation, layer
from torch import Tensor

pytestmark = pytest.mark.skipif(emulation.compiler() is None, reason="there is no C++ compiler")

HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("formula", ["taylor_signed", "taylor_abs", "fisher", "mixed"])
def test_salience_from_activations_matches_float64(formula: str, dtype: torch.dtype, library: ctypes.CDLL) -> None:
    """Less than a tile, and more tiles than run at once: an odd number of them, ragged ends."""
    with emulation.capability_9(library, expected=2):
        assert_activation(library, *layer(3, 20, 24, 40, dtype), formula)
        assert_activation(library, *layer(1, 70, 520, 392, dtype), formula)


def test_sizes_from_one_word_of_channels_on(library: ctypes.CDLL) -> None:
    with emulation.capability_9(library, expected=6):
        for size in ((1, 1, 8, 8), (2, 65, 264, 136), (2, 33, 64, 256)):
            x, dy, weight = layer(*size, torch.bfloat16)
            assert_activation(library, x, dy, weight, "fisher")
            assert_activation(library, x, dy, weight.t().contiguous(), "mixed", transposed=True)


def test_long_texts_go_around_the_ring_many_times(library: ctypes.CDLL) -> None:
    with emulation.capability_9(library, expected=2):
        assert_activation(library, *layer(2, 700, 72, 136, torch.bfloat16), "fisher")
        assert_activation(library, *layer(40, 30, 72, 136, torch.bfloat16), "taylor_abs")


def test_views_whose_tokens_start_at_whole_words_are_read_in_place(library: ctypes.CDLL) -> None:
    x, dy, weight = layer(4, 40, 160, 136, torch.bfloat16)
    with emulation.capability_9(library, expected=3):
        assert_activation(library, x[:, :, 8:144], dy[:, :, 16:], weight[16:, 8:144], "mixed")
        assert_activation(library, x[::2, ::3], dy[::2, ::3], weight, "fisher")
        assert_activation(library, x[1:, 2:], dy[1:, 2:], weight, "taylor_abs")


def test_what_the_copies_cannot_walk_is_left_to_the_other_kernel(library: ctypes.CDLL) -> None:
    """Rows of odd length, starts between words, one sample for all, samples within tokens; float32."""
    x, dy, weight = layer(4, 40, 80, 72, torch.bfloat16)
    with emulation.capability_9(library, expected=0):
        assert_activation(library, *layer(2, 5, 7, 3, torch.bfloat16), "fisher")
        assert_activation(library, x[:, :, 3:67], dy[:, :, 1:], weight[1:, 3:67], "mixed")
        assert_activation(library, x[:1].expand(4, 40, 80), dy, weight, "fisher")
        assert_activation(library, x.transpose(0, 1), dy.transpose(0, 1), weight, "mixed")
        assert_activation(library, *layer(2, 20, 24, 40, torch.float32), "fisher")


def test_infinity_outside_a_view_stays_outside(library: ctypes.CDLL) -> None:
    x, dy, weight = (torch.full(s, torch.inf, dtype=torch.bfloat16) for s in ((2, 20, 96), (2, 20, 88), (88, 96)))
    inner = (x[:, 1:19, 8:74], dy[:, 1:19, 8:70], weight[8:70, 8:74])
    for t in inner:
        t.normal_()
    with emulation.capability_9(library, expected=2):
        for formula in ("taylor_abs", "mixed"):
            assert_activation(library, *inner, formula)


def test_infinity_inside_reaches_what_it_meets_and_nothing_else(library: ctypes.CDLL) -> None:
    """At ragged edges an infinite input meets the zeros that stand for what lies beyond."""
    x, dy, weight = layer(2, 20, 72, 136, torch.bfloat16)
    x[1, 7, 5] = torch.inf
    for formula in ("fisher", "taylor_abs"):
        expected = emulation.activation_salience(library, x, dy, weight, formula, False, (1.0, 1.0))
        with emulation.capability_9(library, expected=1):
            got = emulation.activation_salience(library, x, dy, weight, formula, False, (1.0, 1.0))
        assert bool(got[0].isinf().all()) and got[1].isinf().nonzero().tolist() == [[5]]
        for value, other in zip(got, expected, strict=True):
            torch.testing.assert_close(value, other)


def test_repeats_give_the_same_bits(library: ctypes.CDLL) -> None:
    x, dy, weight = layer(2, 70, 400, 264, torch.float16)

    def run() -> tuple[Tensor, Tensor]:
        return emulation.activation_salience(library, x, dy, weight, "mixed", False, (1.0, 1.0))

    with emulation.capability_9(library, expected=2):
        assert all(map(torch.equal, run(), run()))


BREAKS = {
    "a stage is given back while products read it": ("wait_products<1>();", "wait_products<2>();"),
    "a stage is read before its bytes are there": (
        "        wait_phase(shared_.full(ring_.stage), ring_.phase);\n        const uint64_t a",
        "        const uint64_t a",
    ),
    "the other block is not waited for": ("static_cast<uint32_t>(lane_));", "pair_rank());"),
    "panels are a line apart": ("cols(ring_.stage), kPanelBytes)", "cols(ring_.stage), 1024)"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BREAKS)
def test_the_emulator_notices_a_broken_kernel(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of the check."""
    good, bad = BREAKS[case]
    library = emulation.build_changed(tmp_path, monkeypatch, "activation_wgmma.cuh", good, bad)
    torch.manual_seed(0)
    with emulation.capability_9(library, expected=1), pytest.raises(AssertionError):
        assert_activation(library, *layer(2, 600, 400, 304, torch.bfloat16), "fisher")
