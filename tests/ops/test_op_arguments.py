"""Mistakes are named before a kernel is called: which argument, what it is, what it should be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pyprune import PyPruneError, ops

W, G, H = torch.ones(3, 4), torch.ones(3, 4), torch.ones(3, 4)
BF = torch.ones(3, 4, dtype=torch.bfloat16)

MISTAKES: list[tuple[str, Callable[[], object], str]] = [
    ("unknown formula", lambda: ops.salience("taylor", [W], [G]), "taylor_abs"),
    ("bare tensor", lambda: ops.salience("abs", W), "weights: must be a list of tensors, got Tensor"),
    ("not a tensor", lambda: ops.salience("abs", [W, 3]), r"weights\[1\]: must be a tensor, got int"),
    ("no gradients", lambda: ops.salience("taylor_abs", [W]), "grads: is needed by formula 'taylor_abs'"),
    ("no curvatures", lambda: ops.salience("fisher", [W]), "curvatures: is needed by formula 'fisher'"),
    ("too few gradients", lambda: ops.salience("taylor_abs", [W, W], [G]), "grads: has 1 entries for 2 weights"),
    ("other shape", lambda: ops.salience("taylor_abs", [W], [G.t()]), r"grads\[0\] \[4, 3\]: differs in shape"),
    (
        "meta device",
        lambda: ops.salience("taylor_abs", [W], [G.to("meta")]),
        r"grads\[0\] 'meta': is on another device",
    ),
    (
        "half gradient",
        lambda: ops.salience("taylor_abs", [W], [BF]),
        r"grads\[0\] 'torch.bfloat16': must be torch.float32",
    ),
    ("half curvature", lambda: ops.salience("fisher", [BF], None, [BF]), r"curvatures\[0\] 'torch.bfloat16'"),
    ("whole numbers", lambda: ops.salience("abs", [W.long()]), r"weights\[0\] 'torch.int64': must be float32"),
    ("four dimensions", lambda: ops.salience("abs", [torch.ones(1, 1, 1, 1)]), "must have 1 to 3 dimensions"),
    ("no dimension", lambda: ops.salience("abs", [torch.tensor(1.0)]), "must have 1 to 3 dimensions"),
    ("accumulate counts", lambda: ops.accumulate_square_([H], []), "grads: has 0 entries for 1 curvatures"),
    ("accumulate dtype", lambda: ops.accumulate_square_([BF], [G]), r"curvatures\[0\] 'torch.bfloat16'"),
    ("accumulate shape", lambda: ops.accumulate_square_([H], [G[:2]]), r"grads\[0\] \[2, 4\]: differs in shape"),
    ("gather mapping", lambda: ops.gather([W], {0: [1]}), "indices: must be a list of mappings, got dict"),
    ("gather count", lambda: ops.gather([W], []), "indices: has 0 entries for 1 tensors"),
    ("gather range", lambda: ops.gather([W], [{0: [0, 3]}]), r"indices\[0\]\[0\] '0..3': leaves the dimension"),
    ("gather negative", lambda: ops.gather([W], [{1: [-1]}]), "leaves the dimension, which has 4 positions"),
    ("gather dim", lambda: ops.gather([W], [{2: [0]}]), r"indices\[0\]\[2\]: tensor 0 has 2 dimensions only"),
    ("gather twice", lambda: ops.gather([W], [{1: [0], -1: [0]}]), "names a dimension that is named already"),
    ("gather mask", lambda: ops.gather([W], [{0: [True, False, True]}]), "must be 1-D whole numbers, got bool"),
    ("gather 2-D index", lambda: ops.gather([W], [{0: [[0]]}]), "must be 1-D whole numbers"),
    ("gather 4-D", lambda: ops.gather([torch.ones(1, 1, 1, 1)], [{}]), "must have 1 to 3 dimensions"),
    (
        "out shape",
        lambda: ops.gather([W], [{0: [1]}], [torch.ones(2, 4)]),
        r"out\[0\] \[2, 4\]: must have shape \[1, 4\]",
    ),
    ("out dtype", lambda: ops.gather([W], [{0: [1]}], [BF[:1]]), r"out\[0\] 'torch.bfloat16 on cpu': must be"),
    ("out strides", lambda: ops.gather([W], [{}], [torch.ones(4, 3).t()]), r"out\[0\]: must be contiguous"),
    ("moments of a list", lambda: ops.channel_moments([W]), "x: must be a tensor, got list"),
    ("moments of a number", lambda: ops.channel_moments(torch.tensor(1.0)), "must have a last dimension of channels"),
    ("moments of whole numbers", lambda: ops.channel_moments(W.long()), "x 'torch.int64': must be float32"),
    ("dots without samples", lambda: ops.channel_dots(W, G), r"a \[3, 4\]: does not say where its samples are"),
    ("dots in unequal samples", lambda: ops.channel_dots(W, G, samples=2), "samples 2: does not divide the 3 rows"),
    ("dots of no samples", lambda: ops.channel_dots(W, G, samples=0), "samples 0: does not divide"),
    ("dots of other shapes", lambda: ops.channel_dots(W, G.t(), samples=1), r"b \[4, 3\]: differs in shape from a"),
    ("dots of other dtypes", lambda: ops.channel_dots(W, BF, samples=1), "b 'torch.bfloat16': must be torch.float32"),
    ("gram out shape", lambda: ops.gram(W, out=torch.ones(3, 3)), r"out \[3, 3\]: must be a \[4, 4\] tensor"),
    ("gram out dtype", lambda: ops.gram(BF, out=torch.ones(4, 4).bfloat16()), "must be torch.float32 on cpu"),
    ("gram out list", lambda: ops.gram(W, out=[W]), "out 'list': must be a"),
    ("out count", lambda: ops.gather([W], [{}], []), "out: has 0 entries for 1 tensors"),
]


@pytest.mark.parametrize(("call", "message"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_a_mistake_names_the_argument_and_the_way_out(call: Callable[[], object], message: str) -> None:
    with pytest.raises(PyPruneError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)
