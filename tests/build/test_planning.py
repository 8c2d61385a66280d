"""Native planning: runs of kept positions, and pieces of like size."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

_C = pytest.importorskip("pyprune._C", reason="the package was installed without a compiler")


def test_neighbours_become_one_run() -> None:
    runs = _C.coalesce_runs(np.array([3, 4, 5, 9, 10, 2, 2, 1]))
    assert runs.tolist() == [[3, 0, 3], [9, 3, 2], [2, 5, 1], [2, 6, 1], [1, 7, 1]]
    assert runs.dtype == np.int64


def test_no_positions_give_no_runs() -> None:
    assert _C.coalesce_runs(np.array([], dtype=np.int64)).shape == (0, 3)


@given(st.lists(st.integers(0, 40)))
def test_runs_are_the_positions_and_cannot_be_joined_further(positions: list[int]) -> None:
    runs = _C.coalesce_runs(np.array(positions, dtype=np.int64))
    expanded = [source + k for source, _, length in runs.tolist() for k in range(length)]
    assert expanded == positions
    assert [dest for _, dest, _ in runs.tolist()] == list(np.cumsum([0, *runs[:-1, 2]])) if len(runs) else not positions
    assert all(a[0] + a[2] != b[0] for a, b in pairwise(runs.tolist()))


@given(st.lists(st.integers(0, 1000), max_size=20), st.integers(1, 300))
def test_chunks_cover_every_item_once_and_are_never_too_long(sizes: list[int], limit: int) -> None:
    plan = _C.chunk_plan(np.array(sizes, dtype=np.int64), limit)
    seen = [(t, i) for t, begin, end in plan.tolist() for i in range(begin, end)]
    assert seen == [(t, i) for t, size in enumerate(sizes) for i in range(size)]
    assert all(0 < end - begin <= limit for _, begin, end in plan.tolist())


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="1-D"):
        _C.coalesce_runs(np.zeros((2, 2), dtype=np.int64))
    with pytest.raises(ValueError, match="limit"):
        _C.chunk_plan(np.array([1]), 0)
