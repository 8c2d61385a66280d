"""Scaled dot-product attention, whatever kernel runs it."""

from __future__ import annotations

from pyprune.discovery import axes as ax
from pyprune.discovery.rules import rule
from pyprune.discovery.tracer import Call, Info


@rule("scaled_dot_product_attention")
def attention(call: Call) -> Info:
    """q [*, Hq, L, E], k [*, Hk, S, E], v [*, Hv, S, V] -> [*, Hq, L, V]; Hq a multiple of Hk, Hv when grouped."""
    q, k, v = (call.info(n) for n in ("query", "key", "value"))
    batch = len(q.axes) - 2
    for d in range(batch):
        for other in (k, v):
            _unify_heads(call, q.axes[d], other.axes[d])
        ax.mark(q.axes[d], "heads")
    call.unify(q.axes[-1], k.axes[-1])
    call.unify(k.axes[-2], v.axes[-2])
    ax.mark(q.axes[-1], "qk")
    ax.mark(v.axes[-1], "vo")
    if call.get("scale") is None:
        # The kernel then scales by 1 / sqrt(E) with the E that it meets: cutting E changes the scale.
        ax.mark(q.axes[-1], "size")
    if not (q.zero[-1] or k.zero[-1]):
        ax.mark(q.axes[-1], "nonzero")
    mask = call.get("attn_mask")
    if mask is not None:
        info = call.info(mask)
        for d, axis in enumerate((*q.axes[:-1], k.axes[-2])):
            own = d - (len(q.axes) - len(info.axes))
            if own >= 0 and info.axes[own].size == axis.size:
                call.join(axis, info, own, made=False)
    zero = (*v.zero[:batch], False, v.zero[-1])
    active = q.active or k.active or v.active
    return Info((*q.axes[:-1], v.axes[-1]), zero, active=active)


def _unify_heads(call: Call, q: ax.Axis, other: ax.Axis) -> None:
    if other.size == q.size:
        call.unify(q, other)
    elif other.size > 1:
        call.unify(ax.divide(q, q.size // other.size)[0], other)
