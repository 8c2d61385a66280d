"""Kept slices of many tensors in one call: what makes a pruned model really smaller."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyprune.errors import PyPruneError
from pyprune.ops import _check, _native, reference


def gather(
    tensors: Sequence[Tensor],
    indices: Sequence[Mapping[int, Any] | None],
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Copies the kept positions along every given dimension of every tensor.

    ``gather([w], [{0: rows, 1: cols}])[0]`` equals ``w[rows][:, cols]``. Positions may come in any order and repeat.
    Neighbouring positions are moved together as wide words.

    Args:
        tensors: 1-D to 3-D, any dtype and strides.
        indices: for each tensor a mapping from dimension (negative counts from the end) to the kept positions: a 1-D
            integer tensor or array. Dimensions that are not named stay whole; ``None`` or an empty mapping copies.
        out: contiguous tensors to write to, of the results' shapes, dtypes and devices; they must not overlap the
            inputs. Without it new tensors are made.

    Returns:
        One contiguous tensor for each input, in its dtype, on its device (``out``'s own tensors when given).

    Raises:
        PyPruneError: on a position outside its dimension, or outputs that do not fit.
    """
    tensors = _check.tensor_list("tensors", tensors)
    if isinstance(indices, Mapping) or not isinstance(indices, Sequence):
        raise PyPruneError("indices", None, f"must be a list of mappings, got {type(indices).__name__}")
    _check.same_length("indices", indices, len(tensors), "tensors")
    known: dict[int, tuple[np.ndarray, int, int, Any]] = {}
    kept = [
        _kept(i, tensor, index or {}, known) for i, (tensor, index) in enumerate(zip(tensors, indices, strict=True))
    ]
    shapes = [
        tuple(len(k[d]) if d in k else size for d, size in enumerate(t.shape))
        for t, k in zip(tensors, kept, strict=True)
    ]
    results = (
        [t.new_empty(s) for t, s in zip(tensors, shapes, strict=True)]
        if out is None
        else _outputs(out, tensors, shapes)
    )

    sets: dict[torch.device, list[int]] = {}
    for i, tensor in enumerate(tensors):
        sets.setdefault(tensor.device, []).append(i)
    with torch.no_grad():
        for device, members in sets.items():
            if _native.runs_on(device):
                _compiled([tensors[i] for i in members], [kept[i] for i in members], [results[i] for i in members])
            else:
                reference.gather(
                    [tensors[i] for i in members],
                    [{d: torch.from_numpy(p) for d, p in kept[i].items()} for i in members],
                    [results[i] for i in members],
                )
    return results


def _kept(
    i: int, tensor: Tensor, index: Mapping[int, Any], known: dict[int, tuple[np.ndarray, int, int, Any]]
) -> dict[int, np.ndarray]:
    """Checked int64 arrays by non-negative dimension. ``known``: what :func:`_positions` found, by id of its input."""
    _check.dimensions(f"tensors[{i}]", tensor)
    kept: dict[int, np.ndarray] = {}
    dims = tensor.dim()
    if not isinstance(index, Mapping):
        raise PyPruneError(f"indices[{i}]", type(index).__name__, "must be a mapping from dimensions to positions")
    for dim, positions in index.items():
        if not isinstance(dim, int):
            raise PyPruneError(f"indices[{i}]", dim, "names a dimension by something else than a whole number")
        if not -dims <= dim < dims:
            raise PyPruneError(f"indices[{i}][{dim}]", None, f"tensor {i} has {dims} dimensions only")
        # Coupled tensors are cut at the same positions, which often are one object.
        if id(positions) not in known:
            known[id(positions)] = _positions(f"indices[{i}][{dim}]", positions)
        array, lowest, highest, _ = known[id(positions)]
        if lowest < 0 or highest >= tensor.shape[dim]:
            problem = f"leaves the dimension, which has {tensor.shape[dim]} positions"
            raise PyPruneError(f"indices[{i}][{dim}]", f"{lowest}..{highest}", problem)
        if dim % dims in kept:
            raise PyPruneError(f"indices[{i}][{dim}]", None, "names a dimension that is named already")
        kept[dim % dims] = array
    return kept


def _positions(option: str, positions: Any) -> tuple[np.ndarray, int, int, Any]:
    """A contiguous int64 array [n] with its smallest and largest entry (0 and -1 when it is empty), and ``positions``,
    which is kept alive so that its id stays its own."""
    try:
        array = positions.detach().cpu().numpy() if isinstance(positions, Tensor) else np.asarray(positions)
    except (ValueError, TypeError, RuntimeError) as error:  # ragged lists, tensors without values
        raise PyPruneError(
            option, type(positions).__name__, f"cannot be read: {error}", "Give whole numbers."
        ) from None
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise PyPruneError(option, None, f"must be 1-D whole numbers, got {array.dtype} of shape {list(array.shape)}")
    if not array.size:
        return np.empty(0, dtype=np.int64), 0, -1, positions
    return np.ascontiguousarray(array, dtype=np.int64), int(array.min()), int(array.max()), positions


def _outputs(out: Sequence[Tensor], tensors: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    out = _check.tensor_list("out", out)
    _check.same_length("out", out, len(tensors), "tensors")
    for i, (o, tensor, shape) in enumerate(zip(out, tensors, shapes, strict=True)):
        if tuple(o.shape) != shape:
            raise PyPruneError(f"out[{i}]", list(o.shape), f"must have shape {list(shape)}")
        if o.dtype != tensor.dtype or o.device != tensor.device:
            raise PyPruneError(f"out[{i}]", f"{o.dtype} on {o.device}", f"must be {tensor.dtype} on {tensor.device}")
        if not o.is_contiguous():
            raise PyPruneError(f"out[{i}]", None, "must be contiguous")
    return list(out)


def _compiled(tensors: list[Tensor], kept: list[dict[int, np.ndarray]], results: list[Tensor]) -> None:
    """One call of the compiled op: positions go in as runs ``(source, destination, length)`` of neighbours."""
    module = _native.native().module
    assert module is not None
    counts: list[int] = []
    runs: list[np.ndarray] = []
    coalesced: dict[int, np.ndarray] = {}
    for tensor, k in zip(tensors, kept, strict=True):
        for dim in range(tensor.dim()):
            if dim not in k:
                counts.append(-1)
                continue
            positions = k[dim]
            if id(positions) not in coalesced:
                coalesced[id(positions)] = module.coalesce_runs(positions)
            runs.append(coalesced[id(positions)])
            counts.append(len(runs[-1]))
    table = np.concatenate(runs) if runs else np.empty((0, 3), dtype=np.int64)
    torch.ops.pyprune.gather(tensors, torch.from_numpy(table), counts, results)
