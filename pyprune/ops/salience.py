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
    weights, grads, curvatures = _checked(formula, weights, grads, curvatures)
    code = reference.FORMULAS[formula].code
    rows: list[Tensor] = [torch.empty(0)] * len(weights)
    cols: list[Tensor] = [torch.empty(0)] * len(weights)
    for members, compiled in _by_launch(weights):
        w, g, h = (_taken(values, members) for values in (weights, grads, curvatures))
        with torch.no_grad():
            if compiled:
                r, c = _cut(w, *torch.ops.pyprune.salience(w, g, h, code))
            else:
                r, c = reference.salience(formula, w, g, h)
        for i, row, col in zip(members, r, c, strict=True):
            rows[i], cols[i] = row, col
    return rows, cols


class PreparedSalience:
    """:func:`salience` of the same tensors again and again, a call at the same cost to the host however many they are.

    Made by :func:`prepare_salience`. A call reads what the tensors hold by then. Their addresses are held, so they are
    to be changed in place (``zero_grad(set_to_none=False)``), and prepared anew when one of them gets other memory.
    Every call writes the same sums: copy what must outlast the next one, and let one CUDA stream at a time make calls.
    A CUDA graph may capture a call; ``torch.compile`` does not see what it reads.
    """

    def __init__(
        self, formula: str, weights: Sequence[Tensor], grads: Sequence[Tensor], curvatures: Sequence[Tensor]
    ) -> None:
        self._formula = formula
        self._tensors = (list(weights), list(grads), list(curvatures))
        self._rows: list[Tensor] = [torch.empty(0)] * len(weights)
        self._cols: list[Tensor] = [torch.empty(0)] * len(weights)
        self._prepared: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # sums, the call, its workspace
        self._plain: list[list[int]] = []
        for members, compiled in _by_launch(weights):
            if not compiled:
                self._plain.append(members)
                continue
            w, g, h = (_taken(values, members) for values in self._tensors)
            with torch.no_grad():
                call = torch.ops.pyprune.salience_prepare(w, g, h, reference.FORMULAS[formula].code)
            self._prepared.append(call)
            self._put(members, *_cut(w, call[0], call[1]))

    def __call__(self) -> tuple[list[Tensor], list[Tensor]]:
        """``(rows, cols)``, as :func:`salience` returns them; the next call overwrites them."""
        with torch.no_grad():
            for call in self._prepared:
                for t in call:
                    if t.is_cuda:  # not to be given away while this stream still needs it
                        t.record_stream(torch.cuda.current_stream(t.device))
                torch.ops.pyprune.salience_again_(*call)
            for members in self._plain:
                w, g, h = (_taken(values, members) for values in self._tensors)
                self._put(members, *reference.salience(self._formula, w, g, h))
        return self._rows, self._cols

    def _put(self, members: list[int], rows: Sequence[Tensor], cols: Sequence[Tensor]) -> None:
        for i, row, col in zip(members, rows, cols, strict=True):
            self._rows[i], self._cols[i] = row, col


def prepare_salience(
    formula: str,
    weights: Sequence[Tensor],
    grads: Sequence[Tensor] | None = None,
    curvatures: Sequence[Tensor] | None = None,
) -> PreparedSalience:
    """:func:`salience` made ready to be called often: arguments are checked and tables are sent to the device once.

    ::

        sums = prepare_salience("taylor_abs", weights, grads)
        for batch in batches:
            model(**batch).loss.backward()  # into the same gradients
            rows, cols = sums()

    Args:
        formula, weights, grads, curvatures: as in :func:`salience`; columns must be neighbours in memory.

    Raises:
        PyPruneError: what :func:`salience` refuses, and a tensor whose columns are no neighbours in memory, or that is
            negated by a mark (``Tensor.is_neg``).
    """
    lists = _checked(formula, weights, grads, curvatures)
    for option, values in zip(("weights", "grads", "curvatures"), lists, strict=True):
        for i, t in enumerate(values):
            _check.neighbouring_columns(f"{option}[{i}]", t)
            if t.is_neg():
                hint = "Call resolve_neg() first."
                raise PyPruneError(f"{option}[{i}]", None, "is negated where it is read, not in memory", hint)
    return PreparedSalience(formula, *lists)


def _checked(
    formula: str,
    weights: Sequence[Tensor],
    grads: Sequence[Tensor] | None,
    curvatures: Sequence[Tensor] | None,
) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    """The three lists, those empty that the formula does not read."""
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
    return weights, grads, curvatures


def _partner(option: str, values: Sequence[Tensor] | None, formula: str, needed: bool, count: int) -> Sequence[Tensor]:
    """The list when the formula reads it, else an empty one."""
    if not needed:
        return []
    if values is None:
        raise PyPruneError(option, None, f"is needed by formula {formula!r}", "Give one tensor for each weight.")
    values = _check.tensor_list(option, values)
    _check.same_length(option, values, count, "weights")
    return values


def _by_launch(weights: Sequence[Tensor]) -> list[tuple[list[int], bool]]:
    """Positions of the weights that one call serves, by device and dtype of the sums; whether it is a compiled one."""
    sets: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, weight in enumerate(weights):
        sets.setdefault((weight.device, reference.accumulation_dtype(weight.dtype)), []).append(i)
    return [
        (members, _native.runs_on(device) and not (device.type == "cuda" and dtype == torch.float64))
        for (device, dtype), members in sets.items()
    ]


def _taken(values: Sequence[Tensor], members: list[int]) -> list[Tensor]:
    return [values[i] for i in members] if values else []


def _cut(w: list[Tensor], flat_rows: Tensor, flat_cols: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The flat sums of a compiled call as one view per tensor."""
    row_shapes = [t.shape[:-1] if t.dim() > 1 else t.shape for t in w]
    col_shapes = [(*t.shape[:-2], t.shape[-1]) if t.dim() > 1 else (1,) for t in w]
    return _views(flat_rows, row_shapes), _views(flat_cols, col_shapes)


def _views(flat: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    sizes = [shape[0] if len(shape) == 1 else shape[0] * shape[1] for shape in shapes]
    pieces = flat.split(sizes)
    return [piece if len(shape) == 1 else piece.view(*shape) for piece, shape in zip(pieces, shapes, strict=True)]
