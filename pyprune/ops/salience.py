"""Row and column sums of a per-element salience, for many tensors in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyprune.errors import PyPruneError, unknown_name
from pyprune.ops import _check, _native, reference


def salience(
    formula: str,
    weights: Sequence[Tensor],
    grads: Sequence[Tensor] | None = None,
    curvatures: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Sums ``f(w, g, h)`` over the columns and over the rows of every tensor, reading each element once.

    ==================  ==========================  =======================================
    formula             f                           where it comes from
    ==================  ==========================  =======================================
    ``abs``             ``|w|``                     magnitude, L1
    ``square``          ``w^2``                     magnitude, squared L2
    ``taylor_signed``   ``w * g``                   first-order Taylor of a whole structure
    ``taylor_abs``      ``|w * g|``                 first-order Taylor, element-wise
    ``fisher``          ``w^2 * h``                 Optimal Brain Damage with Fisher diagonal
    ``mixed``           ``|w * g - w^2 * h / 2|``   both orders together
    ==================  ==========================  =======================================

    The LLM-Pruner paper (Ma et al., 2023, section 3.2) states the Taylor forms. ``taylor_signed`` returns signed sums:
    the magnitude belongs to the structure, so the caller takes it after adding up the structure's members.

    Args:
        formula: a name of the table.
        weights: tensors [N], [R, C] or [B, R, C], any strides, float32 / bfloat16 / float16 / float64. Row-strided
            inputs are read in place; other layouts are copied first.
        grads: one per weight, of its shape, in its dtype (or float32 beside a 16-bit weight). Needed by ``taylor_*``
            and ``mixed``.
        curvatures: one per weight, of its shape, float32 (float64 beside float64). Needed by ``fisher`` and ``mixed``.

    Returns:
        ``(rows, cols)``, two lists of float32 tensors (float64 for float64 weights) on the weights' devices: [B, R] and
        [B, C] for 3-D weights, [R] and [C] for 2-D, and for 1-D [N] and [1], the vector being one column. Sums are
        accumulated in an order that depends on the shape only, so equal inputs give equal bits on the same device.

    Raises:
        PyPruneError: on an unknown formula, missing inputs, or tensors that do not match.
    """
    if formula not in reference.FORMULAS:
        raise unknown_name("formula", formula, reference.FORMULAS)
    spec = reference.FORMULAS[formula]
    weights = _check.tensor_list("weights", weights)
    grads = _partner("grads", grads, formula, spec.needs_grad, len(weights))
    curvatures = _partner("curvatures", curvatures, formula, spec.needs_curvature, len(weights))
    for i, weight in enumerate(weights):
        _check.dimensions(f"weights[{i}]", weight)
        _check.floating(f"weights[{i}]", weight)
        if grads:
            _check.same_place(f"grads[{i}]", grads[i], weight, "its weight")
            _check.gradient_dtype(f"grads[{i}]", grads[i], weight)
        if curvatures:
            _check.same_place(f"curvatures[{i}]", curvatures[i], weight, "its weight")
            _check.curvature_dtype(f"curvatures[{i}]", curvatures[i], weight)

    rows: list[Tensor] = [torch.empty(0)] * len(weights)
    cols: list[Tensor] = [torch.empty(0)] * len(weights)
    for (device, dtype), members in _by_launch(weights).items():
        w = [weights[i] for i in members]
        g = [grads[i] for i in members] if grads else []
        h = [curvatures[i] for i in members] if curvatures else []
        with torch.no_grad():
            if _native.runs_on(device) and not (device.type == "cuda" and dtype == torch.float64):
                r, c = _compiled(spec.code, w, g, h)
            else:
                r, c = reference.salience(formula, w, g, h)
        for i, row, col in zip(members, r, c, strict=True):
            rows[i], cols[i] = row, col
    return rows, cols


def _partner(option: str, values: Sequence[Tensor] | None, formula: str, needed: bool, count: int) -> Sequence[Tensor]:
    """The list when the formula reads it, else an empty one."""
    if not needed:
        return []
    if values is None:
        raise PyPruneError(option, None, f"is needed by formula {formula!r}", "Give one tensor for each weight.")
    values = _check.tensor_list(option, values)
    _check.same_length(option, values, count, "weights")
    return values


def _by_launch(weights: Sequence[Tensor]) -> dict[tuple[torch.device, torch.dtype], list[int]]:
    """Positions of the weights by device and dtype of the sums: one compiled call serves one such set."""
    sets: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, weight in enumerate(weights):
        sets.setdefault((weight.device, reference.accumulation_dtype(weight.dtype)), []).append(i)
    return sets


def _compiled(code: int, w: list[Tensor], g: list[Tensor], h: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """One call of the compiled op, its two flat outputs cut into one view per tensor."""
    flat_rows, flat_cols = torch.ops.pyprune.salience(w, g, h, code)
    row_shapes = [t.shape[:-1] if t.dim() > 1 else t.shape for t in w]
    col_shapes = [(*t.shape[:-2], t.shape[-1]) if t.dim() > 1 else (1,) for t in w]
    return _views(flat_rows, row_shapes), _views(flat_cols, col_shapes)


def _views(flat: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    sizes = [shape[0] if len(shape) == 1 else shape[0] * shape[1] for shape in shapes]
    pieces = flat.split(sizes)
    return [piece if len(shape) == 1 else piece.view(*shape) for piece, shape in zip(pieces, shapes, strict=True)]
