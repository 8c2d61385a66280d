"""Slicing and squared gradients by the CUDA kernels' own code, run on the CPU, with guards around what they write."""

from __future__ import annotations

import ctypes
import itertools
import random

import helpers_emulation as emulation
import numpy as np
import pytest
import torch
from helpers_ops import FLOATS
from torch import Tensor

pytestmark = pytest.mark.skipif(emulation.compiler() is None, reason="there is no C++ compiler")

GUARD = 77
WIDTHS = [torch.uint8, torch.int16, torch.float32, torch.int64, torch.complex128]


def source_of(rng: random.Random, dtype: torch.dtype) -> Tensor:
    """[batches, rows, cols] at an odd place, with gaps between rows and between batches."""
    batches, rows, cols = rng.choice([1, 1, 1, 3]), rng.choice([1, 2, 7, 40, 300]), rng.choice([1, 5, 16, 33, 130, 700])
    stride, start = cols + rng.choice([0, 0, 1, 8, 9]), rng.choice([0, 0, 1, 3, 8])
    count = batches * (rows + 1) * stride + cols + start
    base = torch.randint(0, 255, (count * dtype.itemsize,), dtype=torch.uint8).view(dtype)
    return base.as_strided((batches, rows, cols), ((rows + 1) * stride, stride, 1), start)


def kept_of(rng: random.Random, size: int) -> np.ndarray | None:
    """Everything, scattered ones, blocks of neighbours, or any positions in any order, repeats among them."""
    kind = rng.randrange(4)
    if kind == 0:
        return None
    if kind == 1:
        found = sorted(rng.sample(range(size), max(1, size * 3 // 4)))
    elif kind == 2:
        width = max(1, size // 8)
        blocks = sorted(rng.sample(range(size // width), max(1, size // width // 2)))
        found = [b * width + i for b in blocks for i in range(width)]
    else:
        found = [rng.randrange(size) for _ in range(rng.randint(1, size + 3))]
    return np.array(found, dtype=np.int64)


def framed(rng: random.Random, want: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes, and within them a place of the size and alignment of ``want``; guards before and behind it."""
    size, bytes_ = want.element_size(), want.numel() * want.element_size()
    frame = torch.full((bytes_ + 256,), GUARD, dtype=torch.uint8)
    start = 64 + rng.choice([0, 0, 1, 2, 4]) * size
    start += -(frame.data_ptr() + start) % size
    return frame, frame[start : start + bytes_]


@pytest.mark.parametrize("seed", range(6))
def test_slices_of_any_width_place_and_order(seed: int, library: ctypes.CDLL) -> None:
    rng = random.Random(seed)
    for _ in range(6):
        calls, wanted = [], []
        shared = kept_of(rng, 33)
        for _ in range(rng.randint(1, 8)):
            source = source_of(rng, rng.choice(WIDTHS))
            kept = [shared if n == 33 else kept_of(rng, n) for n in source.shape]  # coupled tensors keep the same
            want = source
            for dim, positions in enumerate(kept):
                want = want if positions is None else want.index_select(dim, torch.from_numpy(positions))
            frame, place = framed(rng, want)
            calls.append((source, kept, place))
            wanted.append((want, frame, place))
        emulation.gather(library, calls)
        for want, frame, place in wanted:
            assert torch.equal(place, want.contiguous().view(-1).view(torch.uint8)), (want.shape, want.dtype)
            assert int((frame == GUARD).sum()) - int((place == GUARD).sum()) == len(frame) - len(place)


@pytest.mark.parametrize("dtype", FLOATS)
def test_squared_gradients_are_added_in_place(dtype: torch.dtype, library: ctypes.CDLL) -> None:
    """Bit for bit, in whole tiles and at ends, where groups start at multiples of their size and elsewhere."""
    frames, curvatures, grads = [], [], []
    places = ((0, 0), (4, 4), (1, 0), (4, 2), (1, 3))
    for size, (before, start) in itertools.product((0, 1, 7, 2048, 8192, 20001), places):
        frames.append(torch.rand(before + size + 8))
        curvatures.append(frames[-1][before : before + size])
        grads.append(torch.randn(size + start).to(dtype)[start:])
    old = [f.clone() for f in frames]
    expected = [h + 0.3 * g.float().square() for h, g in zip(curvatures, grads, strict=True)]
    emulation.accumulate_square(library, curvatures, grads, 0.3)
    for frame, was, h, want in zip(frames, old, curvatures, expected, strict=True):
        assert torch.equal(h, want)
        assert (frame != was).sum() <= h.numel() and torch.equal(frame[-8:], was[-8:])
