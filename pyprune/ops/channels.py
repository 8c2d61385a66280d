"""Activations reduced to numbers per channel while they are still at hand: moments, dot products, Gram matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from pyprune.errors import PyPruneError
from pyprune.ops import _check, _native, reference
from pyprune.ops.product import is_faster, product

# Rows that :func:`gram` widens to float32 at a time, so that 16-bit activations never exist twice as a whole.
_GRAM_ROWS = 4096


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of ``x`` and of ``x^2`` over everything but the channels, reading each element once.

    ``squares`` is the squared norm of a channel's inputs, whose root Wanda (Sun et al., 2023) multiplies weights with;
    with n rows, ``squares / n - (sums / n)^2`` is the variance by which FLAP (An et al., 2023) ranks channels. Sums of
    several batches add up.

    Args:
        x: activations [..., C], any strides, float32 / bfloat16 / float16 / float64. Layouts that are not a regular
            grid of rows are copied first.

    Returns:
        ``(sums, squares)``, both [C], float32 (float64 for float64), on ``x``'s device. The order of addition depends
        on the shape only, so equal inputs give equal bits on the same device.

    Raises:
        PyPruneError: when ``x`` is no floating-point tensor with channels.
    """
    _channels("x", x)
    with torch.no_grad():
        if _compiled(x):
            sums, squares = torch.ops.pyprune.channel_moments(_rows(x.detach()))
            return sums, squares
        return reference.channel_moments(x)


def channel_dots(a: Tensor, b: Tensor, samples: int | None = None) -> Tensor:
    """``sum over t of a[s, t, c] * b[s, t, c]``: dot products along the tokens of each sample, channel by channel.

    With y a layer's output and dy the loss gradient there, ``sum_t dy * y`` is the gradient of the sample's loss with
    respect to a gate of value one on the channel. First-order Taylor scores add it up over samples; group Fisher (Liu
    et al., 2021) adds up its squares. ``sum_t x * dx`` is the same on the input side.

    Args:
        a: [..., C], usually [B, T, C]; any strides, float32 / bfloat16 / float16 / float64.
        b: of the same shape, dtype and device.
        samples: B, when the samples are not the first dimension of a three-dimensional tensor: the leading dimensions
            are then read as B samples of equally many tokens.

    Returns:
        [B, C], float32 (float64 for float64). The order of addition depends on the shape only.

    Raises:
        PyPruneError: when the tensors differ, or do not divide into that many samples.
    """
    _channels("a", a)
    _channels("b", b)
    _check.same_place("b", b, a, "a")
    if b.dtype != a.dtype:
        raise PyPruneError("b", str(b.dtype), f"must be {a.dtype}, the dtype of a")
    if samples is None:
        if a.dim() != 3:
            raise PyPruneError(
                "a", list(a.shape), "does not say where its samples are", "Shape it [B, T, C] or give samples=B."
            )
        samples = a.shape[0]
    else:
        rows = a.shape[:-1].numel()
        if not isinstance(samples, int) or samples < 1 or rows % samples:
            raise PyPruneError("samples", samples, f"does not divide the {rows} rows of a {list(a.shape)} tensor")
        a, b = (t.reshape(samples, rows // samples, t.shape[-1]) for t in (a, b))
    with torch.no_grad():
        if _compiled(a):
            return torch.ops.pyprune.channel_dots(a.detach(), b.detach())
        return reference.channel_dots(a, b)


def gram(x: Tensor, out: Tensor | None = None) -> Tensor:
    """``x^T x`` over all rows by PyTorch's matrix product, accumulated in float32 (float64 for float64).

    Args:
        x: activations [..., C], float32 / bfloat16 / float16 / float64.
        out: [C, C] in the dtype of the sums, on ``x``'s device; the product is added to it. Default: zeros.

    Returns:
        [C, C]: ``out`` itself when given.

    Raises:
        PyPruneError: when ``x`` has no channels, or ``out`` does not fit.
    """
    _channels("x", x)
    channels, dtype = x.shape[-1], reference.accumulation_dtype(x.dtype)
    with torch.no_grad():
        if out is None:
            out = x.new_zeros(channels, channels, dtype=dtype)
        elif not isinstance(out, Tensor) or out.shape != (channels, channels):
            shape = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise PyPruneError("out", shape, f"must be a [{channels}, {channels}] tensor")
        elif out.dtype != dtype or out.device != x.device:
            raise PyPruneError("out", f"{out.dtype} on {out.device}", f"must be {dtype} on {x.device}")
        target, rows = out.detach(), x.detach().reshape(x.shape[:-1].numel(), channels)
        for piece in rows.split(rows.shape[0] if rows.dtype == dtype else _GRAM_ROWS) if rows.numel() else ():
            wide = piece.to(dtype)
            target.add_(product(wide.t(), wide.t())) if is_faster(wide) else target.addmm_(wide.t(), wide)
    return out


def _channels(option: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise PyPruneError(option, None, f"must be a tensor, got {type(x).__name__}")
    if x.dim() == 0:
        raise PyPruneError(option, list(x.shape), "must have a last dimension of channels")
    _check.floating(option, x)


def _compiled(x: Tensor) -> bool:
    """Whether a kernel is there; float64 has one on the CPU only."""
    return _native.runs_on(x.device) and not (x.is_cuda and x.dtype == torch.float64)


def _rows(x: Tensor) -> Tensor:
    """[T, C] or [B, T, C] with the same rows, without a copy where the strides allow."""
    return x if x.dim() in (2, 3) else x.reshape(x.shape[:-1].numel(), x.shape[-1])
