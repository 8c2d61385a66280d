"""Mixtures of experts: stacked weights addressed through a router's choice, and the products that read them.

A router ranks the expert axis; the integers it returns point into that axis (``Info.values``). Every op below keeps
that knowledge, so the expert dimension of stacked weights [experts, out, in] is found to be the router's own axis.
"""

from __future__ import annotations

from pyprune.discovery import axes as ax
from pyprune.discovery.rules import rule
from pyprune.discovery.rules.indexing import pointed_part
from pyprune.discovery.rules.shape import relabel
from pyprune.discovery.tracer import Call, Info


@rule("_grouped_mm", "grouped_mm_fallback")
def grouped_product(call: Call) -> Info | None:
    """a [tokens, K] sorted by expert, b [experts, K, N], offsets [experts] -> [tokens, N]."""
    custom = call.name == "grouped_mm_fallback"
    a, b = call.info("input" if custom else "self"), call.info("weight" if custom else "mat2")
    if len(a.axes) != 2 or len(b.axes) != 3 or call.get("offs") is None:
        return None
    experts = call.info("offs").axes[0]
    call.unify(b.axes[0], experts)
    ax.mark(b.axes[0], "routed")
    call.unify(a.axes[1], b.axes[1])
    if not (a.zero[1] or b.zero[1]):
        ax.mark(a.axes[1], "nonzero")
    if a.active and not b.active:
        for dim, how in ((1, "contracted"), (2, "produced")):
            ax.mark(b.axes[dim], how)
            call.tracer.use(b, dim, how)
    out = Info((a.axes[0], b.axes[2]), (a.zero[0], b.zero[2]), active=a.active or b.active)
    bias = call.get("bias")
    if bias is not None:
        info = call.info(bias)
        call.unify(info.axes[-1], b.axes[2])
        out.zero = (False, out.zero[1] and info.zero[-1])
        if len(info.axes) == 2:
            call.unify(info.axes[0], experts)
    return out


@rule("histc", "bincount")
def histogram(call: Call) -> Info:
    """Counts of each expert among pointers into the expert axis: the result runs along that axis."""
    info = call.info("self")
    pointed = info.values
    low, high = call.get("min", 0), call.get("max", 0)
    whole = call.name == "bincount" or (low == 0 and high == call.out.shape[0] - 1)
    if pointed is not None and pointed.size == call.out.shape[0] and whole:
        ax.mark(pointed, "routed")
        return Info((pointed,), (False,), active=info.active)
    for axis in info.axes:
        call.freeze(axis, "addressed by value")
    return Info((call.fresh(call.out.shape[0], "addressed by value"),), (False,), active=info.active)


@rule("select_expert")
def select_expert(call: Call) -> Info:
    """``stacked[expert]``: one slice, chosen by a number that points into the axis; all experts are treated alike."""
    info, index = call.info("self"), call.info("index")
    target = index.values
    pointed = None if target is None else pointed_part(target, info.axes[0].size)
    if target is None or pointed is None:
        call.freeze(info.axes[0], "one index selected")
        if target is not None:
            call.freeze(target, "is pointed into by numbers that select elsewhere")
    else:
        call.unify(info.axes[0], pointed)
        ax.mark(info.axes[0], "routed")
    return relabel(info, info.axes[1:], range(1, len(info.axes)))
