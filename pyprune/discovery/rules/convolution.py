"""Convolutions: channels contract, spatial positions are nobody's to prune."""

from __future__ import annotations

from pyprune.discovery import axes as ax
from pyprune.discovery.rules import rule
from pyprune.discovery.tracer import Call, Info


@rule("convolution", "_convolution", "conv1d", "conv2d", "conv3d")
def convolution(call: Call) -> Info:
    """input [B, C, *spatial], weight [O, C / groups, *kernel]; transposed: weight [C, O / groups, *kernel]."""
    x, w = call.info("input"), call.info("weight")
    groups, transposed = call.get("groups", 1), bool(call.get("transposed"))
    channels, a, b = x.axes[1], w.axes[0], w.axes[1]
    contracted, produced = (0, 1) if transposed else (1, 0)
    zero_in, zero_out = w.zero[contracted], w.zero[produced]
    if groups == 1:
        out = b if transposed else a
        call.unify(channels, a if transposed else b)
    else:
        # The channels of group g meet only the outputs of group g: the group axis is shared, batch-like.
        if groups == channels.size:
            ax.mark(channels, "depthwise")
        g_in, inner_in = ax.divide(channels, channels.size // groups)
        g_w, inner_w = ax.divide(a, a.size // groups)
        call.unify(g_in, g_w)
        call.unify(inner_in, inner_w if transposed else b)
        out = ax.product([g_w, b]) if transposed else a
    if not (x.zero[1] or zero_in):
        ax.mark(channels, "nonzero")
    if x.active and not w.active and groups == 1:
        ax.mark(w.axes[contracted], "contracted")
        ax.mark(w.axes[produced], "produced")
        call.tracer.use(w, contracted, "contracted")
        call.tracer.use(w, produced, "produced")
    for axis in w.axes[2:]:
        call.freeze(axis, "convolved over")
    zero = zero_out or (groups > 1 and x.zero[1])
    if call.get("bias") is not None:
        bias = call.info("bias")
        call.unify(out, bias.axes[0])
        zero = zero and bias.zero[0]
    spatial = tuple(call.fresh(n, "positions of a convolution") for n in call.out.shape[2:])
    for axis in x.axes[2:]:
        call.freeze(axis, "convolved over")
    return Info((x.axes[0], out, *spatial), (x.zero[0], zero, *(False for _ in spatial)), active=True)


@rule("max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool1d", "avg_pool2d", "avg_pool3d",
      "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool2d", "upsample_nearest1d",
      "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d")  # fmt: skip
def pooling(call: Call) -> Info | list[Info]:
    """Windows over the spatial dimensions; channels pass, and a channel of zeros stays one."""
    info = call.info("self" if "self" in call.args else "input")
    results = list(call.out) if isinstance(call.out, (list, tuple)) else [call.out]
    first = results[0]
    spatial = first.dim() - (3 if "3d" in call.name else 1 if "1d" in call.name else 2)
    for axis in info.axes[spatial:]:
        call.freeze(axis, "pooled over")
    axes = (*info.axes[:spatial], *(call.fresh(n, "positions of a pooling") for n in first.shape[spatial:]))
    zero = (*info.zero[:spatial], *(False for _ in axes[spatial:]))
    infos = [Info(axes, zero, active=info.active) for _ in results]
    return infos if isinstance(call.out, (list, tuple)) else infos[0]
