"""Squared gradients added to a curvature estimate, for many tensors in one call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pyprune.ops import _check, _native, reference

_ADDRESSES_STOP_THE_COMPILER = torch.__version__ < "2.13"
"""``torch.compile`` does not hash what ``data_ptr()`` gives in 2.10 and 2.11, and was not tried in 2.12."""


def accumulate_square_(curvatures: Sequence[Tensor], grads: Sequence[Tensor], scale: float = 1.0) -> None:
    """``h += scale * g^2`` in place: the running diagonal of the empirical Fisher matrix.

    Args:
        curvatures: tensors of any shape, float32 (float64 beside float64 gradients); changed in place.
        grads: one per curvature, of its shape and on its device, float32 / bfloat16 / float16 (or float64).
        scale: weight of this sample, for example ``1 / samples`` for a mean.

    Raises:
        PyPruneError: when the lists or tensors do not match.
    """
    curvatures = _check.tensor_list("curvatures", curvatures)
    grads = _check.tensor_list("grads", grads)
    _check.same_length("grads", grads, len(curvatures), "curvatures")
    for i, (h, g) in enumerate(zip(curvatures, grads, strict=True)):
        _check.same_place(f"grads[{i}]", g, h, "its curvature")
        _check.floating(f"grads[{i}]", g)
        _check.curvature_dtype(f"curvatures[{i}]", h, g)

    sets: dict[torch.device, list[int]] = {}
    for i, h in enumerate(curvatures):
        sets.setdefault(h.device, []).append(i)
    with torch.no_grad():
        for device, members in sets.items():
            members = [i for i in members if curvatures[i].numel()]
            # The kernels walk memory linearly, so a curvature with gaps or permuted strides is left to PyTorch.
            compiled = [i for i in members if _native.runs_on(device) and _linear(curvatures[i])]
            plain = sorted(set(members) - set(compiled))
            for once in _rounds(compiled, curvatures):
                torch.ops.pyprune.accumulate_square_(
                    [curvatures[i] for i in once], [grads[i] for i in once], float(scale)
                )
            reference.accumulate_square_([curvatures[i] for i in plain], [grads[i] for i in plain], scale)


def _rounds(numbers: Sequence[int], curvatures: Sequence[Tensor]) -> Iterator[list[int]]:
    """``numbers`` in lists in which no curvature comes twice: those of one call are written at the same time."""
    if _ADDRESSES_STOP_THE_COMPILER and torch.compiler.is_compiling():  # one call for each
        yield from ([i] for i in numbers)
        return
    left = list(numbers)
    while left:
        first: dict[int, int] = {}
        for i in left:
            first.setdefault(curvatures[i].data_ptr(), i)
        now = set(first.values())
        yield sorted(now)
        left = [i for i in left if i not in now]


def _linear(h: Tensor) -> bool:
    return h.is_contiguous() and not (h.is_cuda and h.dtype == torch.float64)
