"""Kept slices: equal to indexing bit for bit, whatever the dtype, layout, order and runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers_ops import DEVICES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyprune import ops
from pyprune.errors import PyPruneError

DTYPES = [torch.bool, torch.int8, torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.complex128]


def indexed(tensor: Tensor, index: dict[int, Any] | None) -> Tensor:
    """The definition: PyTorch's own indexing, one dimension after the other."""
    for dim, kept in (index or {}).items():
        tensor = tensor.index_select(dim, torch.as_tensor(np.asarray(kept, dtype=np.int64)).to(tensor.device))
    return tensor


def numbered(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Elements that differ from their neighbours in every dtype."""
    values = torch.arange(int(np.prod(shape)), dtype=torch.int64) * 7919 % 251
    return (values % 2 == 1 if dtype == torch.bool else (values % 120).to(dtype)).reshape(shape).to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_columns_and_batches_of_many_tensors_in_one_call(dtype: torch.dtype, device: str) -> None:
    rng = np.random.default_rng(0)

    def some(size: int, count: int) -> np.ndarray:
        return np.sort(rng.choice(size, count, replace=False))

    cases: list[tuple[tuple[int, ...], dict[int, Any] | None]] = [
        ((64, 96), {0: some(64, 40)}),
        ((64, 96), {1: some(96, 50)}),
        ((65, 97), {0: some(65, 30), 1: some(97, 51)}),
        ((64, 256), {1: np.r_[0:64, 128:256]}),  # whole heads
        ((300, 33), {0: np.arange(300)}),
        ((50, 70), {0: [49, 0, 0, 3], 1: [5, 4, 3, 2, 1]}),  # any order, with repeats
        ((1000,), {0: some(1000, 700)}),
        ((7,), {0: []}),
        ((4, 9, 17), {0: [3, 1]}),
        ((4, 9, 17), {1: some(9, 5)}),
        ((4, 9, 17), {-1: some(17, 11)}),
        ((4, 9, 17), {0: [0, 2], 1: [8, 1], 2: some(17, 8)}),
        ((6, 5), None),
        ((6, 5), {0: [], 1: [1]}),
        ((0, 5), {1: [1, 2]}),
        ((1, 1), {0: [0], 1: [0]}),
        ((3, 20_000), {1: some(20_000, 15_000)}),
    ]
    tensors = [numbered(shape, dtype, device) for shape, _ in cases]
    got = ops.gather(tensors, [index for _, index in cases])
    for tensor, (shape, index), result in zip(tensors, cases, got, strict=True):
        assert result.is_contiguous()
        assert result.device == tensor.device
        assert torch.equal(result, indexed(tensor, index)), (shape, index)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
def test_views_of_any_layout(dtype: torch.dtype, device: str) -> None:
    base, deep = numbered((60, 130), dtype, device), numbered((5, 20, 31), dtype, device)
    views = [
        base[:, 1:],
        base[:, 3:100],
        base[::2],
        base.t(),
        base[:, ::3],
        base[7],
        base[:, 9],
        base[:1].expand(9, 130),
    ]
    views += [deep.transpose(0, 1), deep[:, :, 2:], deep.permute(2, 0, 1)]
    indices = [{d: range(1, size, 2) for d, size in enumerate(v.shape)} for v in views]
    for view, index, result in zip(views, indices, ops.gather(views, indices), strict=True):
        assert torch.equal(result, indexed(view, {d: list(k) for d, k in index.items()}))


@pytest.mark.parametrize("device", DEVICES)
def test_results_can_be_written_into_given_tensors(device: str) -> None:
    tensors = [numbered((20, 30), torch.float32, device), numbered((9,), torch.bfloat16, device)]
    indices = [{0: [1, 2, 3], 1: range(5, 25)}, {0: [8, 0]}]
    frame = torch.zeros(100, device=device)
    out = [frame[20:80].view(3, 20), torch.empty(2, dtype=torch.bfloat16, device=device)]
    got = ops.gather(tensors, indices, out)
    assert got[0] is out[0]
    assert got[1] is out[1]
    assert torch.equal(out[0], indexed(tensors[0], {0: [1, 2, 3], 1: list(range(5, 25))}))
    assert torch.equal(out[1], tensors[1][[8, 0]])
    assert not frame[:20].any()  # wide copies stay inside their tensor
    assert not frame[80:].any()


@pytest.mark.parametrize("device", DEVICES)
def test_whole_tensors_are_copied_not_aliased(device: str) -> None:
    tensor = numbered((4, 5), torch.float32, device)
    (copy,) = ops.gather([tensor], [{}])
    assert torch.equal(copy, tensor)
    assert copy.data_ptr() != tensor.data_ptr()


@pytest.mark.parametrize("device", DEVICES)
def test_indices_may_be_tensors_of_any_integer_dtype_or_arrays_or_lists(device: str) -> None:
    tensor = numbered((10, 4), torch.float32, device)
    kept = [1, 2, 7]
    forms = [kept, tuple(kept), np.array(kept), np.array(kept, dtype=np.uint16), torch.tensor(kept), range(1, 8, 2)]
    forms += [torch.tensor(kept, dtype=torch.int32), torch.tensor(kept, device=device)]
    for form in forms:
        (result,) = ops.gather([tensor], [{0: form}])
        assert torch.equal(result, indexed(tensor, {0: [int(i) for i in form]}))


@pytest.mark.parametrize("device", DEVICES)
def test_positions_beyond_two_to_the_31_elements(device: str) -> None:
    far = 2**31 + 100
    big = torch.empty(far, dtype=torch.uint8, device=device)  # untouched pages take no memory
    big[-4:] = torch.tensor([1, 2, 3, 4], dtype=torch.uint8)
    rows = big.view(-1, 4)
    (result,) = ops.gather([rows], [{0: [rows.shape[0] - 1], 1: [3, 1]}])
    assert result.tolist() == [[4, 2]]


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32, torch.int64, torch.complex128])
@pytest.mark.parametrize("kept", ["scattered", "backwards", "repeated", "sparse", "far apart", "whole heads", "one"])
def test_columns_in_every_pattern(kept: str, dtype: torch.dtype) -> None:
    """Rows of lengths around a cache line, and patterns that take one or many windows of the source a word."""
    rng = np.random.default_rng(0)
    for size in (16, 31, 64, 65, 129, 200, 513):
        patterns: dict[str, Any] = {
            "scattered": np.sort(rng.choice(size, size * 3 // 4, replace=False)),
            "backwards": np.arange(size)[::-1].copy(),
            "repeated": rng.integers(0, size, 2 * size),
            "sparse": np.sort(rng.choice(size, size // 8, replace=False)),
            "far apart": np.stack([np.arange(size // 2), size - 1 - np.arange(size // 2)], 1).ravel(),
            "whole heads": np.r_[0 : size // 4, size // 2 : size],
            "one": np.array([size - 1]),
        }
        for rows in (1, 2, 7):
            tensor = numbered((rows, size), dtype, "cpu")
            (result,) = ops.gather([tensor], [{1: patterns[kept]}])
            assert torch.equal(result, indexed(tensor, {1: patterns[kept]})), (size, rows)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [2048, 2047, 1025])
def test_results_larger_than_the_caches_equal_indexing_and_stay_inside_their_tensor(
    width: int, dtype: torch.dtype
) -> None:
    rows = (6 << 20) // (width * dtype.itemsize)
    tensor = numbered((rows + 40, width), dtype, "cpu")
    some_rows, some_cols = np.delete(np.arange(rows + 40), range(3, 43)), np.delete(np.arange(width), range(0, 50, 7))
    for index in ({0: some_rows}, {1: some_cols}, {0: some_rows, 1: some_cols}):
        expected = indexed(tensor, index)
        for shift in (0, 1, 3):
            frame = torch.full((expected.numel() + 200,), 77).to(dtype)
            out = frame[64 + shift : 64 + shift + expected.numel()].view(expected.shape)
            ops.gather([tensor], [index], [out])
            assert torch.equal(out, expected)
            assert bool((frame[: 64 + shift] == 77).all())
            assert bool((frame[64 + shift + expected.numel() :] == 77).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kept", [32, 96, 224, 432, 433, 2048, 3000])
def test_large_results_of_any_row_length_equal_indexing(kept: int, dtype: torch.dtype) -> None:
    """Rows of whole cache lines, rows that straddle them and are joined first, and rows too long for that."""
    width = kept + kept // 3
    rows = (5 << 20) // (kept * dtype.itemsize)
    tensor = numbered((2, rows, width), dtype, "cpu")
    cols = np.sort(np.random.default_rng(0).choice(width, kept, replace=False))
    some_rows = np.delete(np.arange(rows), [0, 5, 6, rows - 2])
    for index in ({2: cols}, {0: [1], 1: some_rows, 2: cols}, {1: some_rows[::-1].copy(), 2: cols}, {1: some_rows}):
        expected = indexed(tensor, index)
        frame = torch.full((expected.numel() + 64,), 77).to(dtype)
        for shift in (0, 3):
            out = frame[shift : shift + expected.numel()].view(expected.shape)
            ops.gather([tensor], [index], [out])
            assert torch.equal(out, expected), index
            assert bool((frame[shift + expected.numel() :] == 77).all())


def test_tensors_cut_at_columns_of_equal_number_keep_their_own() -> None:
    """Plans are shared between tensors that are cut alike; these differ in one run, in width or in element size."""
    apart = [np.delete(np.arange(200), range(first, 190, 9)) for first in (1, 2, 3, 4, 5, 6)]
    runs = [np.r_[0:50, 60:120], np.r_[0:50, 61:121], np.r_[0:50, 60:120], np.r_[1:51, 60:120]]
    indices = [*apart, *apart[:2], *runs]
    tensors = [numbered((5, 200 + 56 * (i % 2)), (torch.float32, torch.bfloat16)[i % 3 == 2], "cpu") for i in range(12)]
    tensors = [t + t.new_tensor(i % 7) for i, t in enumerate(tensors)]
    for tensor, index, result in zip(tensors, indices, ops.gather(tensors, [{1: i} for i in indices]), strict=True):
        assert torch.equal(result, indexed(tensor, {1: index}))


def test_the_number_of_threads_changes_nothing() -> None:
    tensors = [numbered((900, 700), torch.bfloat16, "cpu"), numbered((200_000,), torch.float32, "cpu")]
    indices = [{0: range(0, 900, 2), 1: range(0, 700, 3)}, {0: range(0, 200_000, 5)}]
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 8):
            torch.set_num_threads(threads)
            results.append(ops.gather(tensors, indices))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_any_index_set_of_any_view(data: st.DataObject) -> None:
    tensors, indices = [], []
    for _ in range(data.draw(st.integers(1, 3))):
        dims = data.draw(st.integers(1, 3))
        shape = tuple(data.draw(st.integers(1, {1: 400, 2: 90, 3: 20}[dims])) for _ in range(dims))
        dtype = data.draw(st.sampled_from(DTYPES))
        order = data.draw(st.permutations(range(dims)))
        cuts = tuple(slice(data.draw(st.integers(0, min(3, size - 1))), None) for size in shape)
        view = numbered(shape, dtype, "cpu")[cuts].permute(*order)
        index: dict[int, Any] = {}
        for d in range(dims):
            if data.draw(st.booleans()):
                size = view.shape[d]
                kept = data.draw(st.lists(st.integers(0, size - 1), max_size=2 * size))
                index[d] = sorted(set(kept)) if data.draw(st.booleans()) else kept
        tensors.append(view)
        indices.append(index)
    for tensor, index, result in zip(tensors, indices, ops.gather(tensors, indices), strict=True):
        assert torch.equal(result, indexed(tensor, index))


@pytest.mark.parametrize(
    "index", ["rows", {"0": [1]}, {0: [[1], [1, 2]]}, {0: torch.zeros(2, dtype=torch.int64, device="meta")}]
)
def test_what_are_no_positions_is_named(index) -> None:
    with pytest.raises(PyPruneError, match=r"indices\[0\]"):
        ops.gather([torch.randn(4, 5)], [index])
