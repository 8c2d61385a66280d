"""The salience of a weight from its layer's activations: tiles of the gradient are formed, used and forgotten."""

from __future__ import annotations

import torch
from torch import Tensor

from pyprune.errors import PyPruneError, unknown_name
from pyprune.ops import _check, _native, reference
from pyprune.ops.accumulate import accumulate_square_
from pyprune.ops.product import product
from pyprune.ops.salience import salience

# Where there is no fused kernel, so many bytes of a gradient at a time.
BLOCK_BYTES = 16 << 20


def activation_salience(
    x: Tensor,
    dy: Tensor,
    weight: Tensor,
    formula: str,
    transposed: bool = False,
    *,
    gradient_scale: float = 1.0,
    curvature_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Row and column sums of a weight's salience, from what went into its layer and the loss gradient that came back.

    With ``G_b = dy_b^T x_b`` the gradient of sample b (``x_b^T dy_b`` where ``transposed``),
    ``g = gradient_scale * sum_b G_b`` and ``h = curvature_scale * sum_b G_b^2``, the sums are those of
    :func:`pyprune.ops.salience` for this w, g and h. No gradient is ever whole: on CUDA one kernel forms its tiles on
    the tensor cores and spends them in registers, on CPUs with AVX2 or AVX-512 one forms blocks of them within the
    caches; elsewhere rows are taken in blocks of about :data:`BLOCK_BYTES`.

    Samples of unequal length are padded: a token whose ``dy`` is zero adds nothing, where its ``x`` is finite.

    Args:
        x: inputs of the layer [samples, tokens, in], in any strides.
        dy: gradient of the loss with respect to the layer's output [samples, tokens, out].
        weight: [out, in], or [in, out] where ``transposed``; the dtype and device of ``x`` and ``dy``.
        formula: ``taylor_signed``, ``taylor_abs``, ``fisher`` or ``mixed``: those that read a gradient.
        transposed: the weight is that of a ``Conv1D`` (``y = x W``) and not of a ``Linear`` (``y = x W^T``).
        gradient_scale: ``1 / samples`` where ``dy`` belongs to each sample's own loss and the mean is meant.
        curvature_scale: likewise ``1 / samples``, over the square of any factor that the loss was scaled by.

    Returns:
        ``(rows, cols)`` of the weight as it is stored, float32 (float64 for float64): [weight.shape[0]] and
        [weight.shape[1]]. Equal inputs in equal layouts give equal bits on the same device.

    Raises:
        PyPruneError: an unknown formula, or tensors that do not fit each other.
    """
    known = [name for name, spec in reference.FORMULAS.items() if spec.needs_grad or spec.needs_curvature]
    if formula not in known:
        raise unknown_name("formula", formula, known)
    _check_shapes(x, dy, weight, transposed)
    with torch.no_grad():
        x, dy, weight = x.detach(), dy.detach(), weight.detach()
        if weight.dtype != torch.float64 and _fused(weight.device):
            code = reference.FORMULAS[formula].code
            return torch.ops.pyprune.activation_salience(
                x, dy, weight, code, transposed, float(gradient_scale), float(curvature_scale)
            )
        rows_input, cols_input = (x, dy) if transposed else (dy, x)
        return _by_blocks(rows_input, cols_input, weight, formula, gradient_scale, curvature_scale)


def _fused(device: torch.device) -> bool:
    """Whether one compiled kernel does it all. Without fused multiply-add PyTorch's matrix product is faster."""
    if not _native.runs_on(device):
        return False
    return device.type == "cuda" or _native.cpu_isa() != "baseline"


def _check_shapes(x: Tensor, dy: Tensor, weight: Tensor, transposed: bool) -> None:
    for option, tensor, dims in (("x", x, 3), ("dy", dy, 3), ("weight", weight, 2)):
        if not isinstance(tensor, Tensor):
            raise PyPruneError(option, None, f"must be a tensor, got {type(tensor).__name__}")
        if tensor.dim() != dims:
            shape = "[samples, tokens, channels]" if dims == 3 else "[rows, columns]"
            raise PyPruneError(option, list(tensor.shape), f"must have {dims} dimensions", f"Reshape it to {shape}.")
    _check.floating("weight", weight)
    for option, tensor in (("x", x), ("dy", dy)):
        if tensor.dtype != weight.dtype:
            raise PyPruneError(option, str(tensor.dtype), f"must be {weight.dtype}, as the weight")
        if tensor.device != weight.device:
            raise PyPruneError(option, str(tensor.device), f"is on another device than the weight, {weight.device}")
    if dy.shape[:2] != x.shape[:2]:
        raise PyPruneError("dy", list(dy.shape), f"has other samples or tokens than x, which is {list(x.shape)}")
    wanted = (x.shape[2], dy.shape[2]) if transposed else (dy.shape[2], x.shape[2])
    if tuple(weight.shape) != wanted:
        raise PyPruneError(
            "weight", list(weight.shape), f"does not fit x and dy, which make {list(wanted)}",
            "Set transposed for a weight of [in, out].",
        )  # fmt: skip


def _by_blocks(
    rows_input: Tensor, cols_input: Tensor, weight: Tensor, formula: str, gradient_scale: float, curvature_scale: float
) -> tuple[Tensor, Tensor]:
    """Blocks of rows: their gradients by matrix products, in float32 or wider, and the sums by the fused kernel."""
    spec = reference.FORMULAS[formula]
    wide = reference.accumulation_dtype(weight.dtype)
    samples, _, columns = cols_input.shape
    cols_input, rows_input = cols_input.to(wide), rows_input.to(wide)
    step = max(1, min(weight.shape[0], BLOCK_BYTES // max(1, columns * wide.itemsize)))
    rows: list[Tensor] = []
    cols = torch.zeros(columns, dtype=wide, device=weight.device)
    for start in range(0, weight.shape[0], step):
        w = weight[start : start + step]
        block = rows_input[..., start : start + step]
        g = h = None
        if spec.needs_curvature:
            h = torch.zeros(w.shape, dtype=wide, device=w.device)
            g = torch.zeros_like(h) if spec.needs_grad else None
            for sample in range(samples):
                each = product(block[sample].T, cols_input[sample].T)
                accumulate_square_([h], [each], curvature_scale)
                if g is not None:
                    g.add_(each, alpha=gradient_scale)
        else:
            g = product(block.flatten(0, 1).T, cols_input.flatten(0, 1).T).mul_(gradient_scale)
        row_sums, col_sums = salience(formula, [w], None if g is None else [g], None if h is None else [h])
        rows.append(row_sums[0])
        cols += col_sums[0]
    return torch.cat(rows) if rows else cols.new_zeros(0), cols
