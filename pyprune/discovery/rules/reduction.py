"""Reductions, norms and softmax: the axis leaves, or its size enters the result."""

from __future__ import annotations

import math

from pyprune.discovery import axes as ax
from pyprune.discovery.rules import rule
from pyprune.discovery.rules.elementwise import elementwise
from pyprune.discovery.tracer import Call, Info

# A sum over an axis that is zero where masked is the same after slicing; these are not.
_SIZE_DEPENDENT = frozenset(
    "mean var std var_mean std_mean amax amin max min logsumexp prod median argmax argmin any all".split()
)


@rule("sum", "mean", "var", "std", "var_mean", "std_mean", "amax", "amin", "max", "min", "logsumexp", "prod", "median",
      "any", "all", "linalg_vector_norm", "norm", "nansum", "count_nonzero", "argmax", "argmin")  # fmt: skip
def reduce(call: Call) -> Info | list[Info]:
    info = call.info("self")
    if call.get("other") is not None:
        return elementwise(call)
    rank = len(info.axes)
    gone = set(call.dims("dim", rank))
    keep = bool(call.get("keepdim"))
    order = call.get("ord", call.get("p"))
    # A norm of negative order is zero as soon as one entry is.
    by_size = call.name in _SIZE_DEPENDENT or (order is not None and (order < 0 or order == math.inf))
    for d in gone:
        call.reduced(info, d, by_size)
    dims = [d for d in range(rank) if keep or d not in gone]
    axes = tuple(ax.ONE if d in gone else info.axes[d] for d in dims)
    zero = tuple(d not in gone and info.zero[d] and call.name not in {"logsumexp", "argmax"} for d in dims)
    first = Info(axes, zero, active=info.active)
    if not isinstance(call.out, (list, tuple)):
        if call.name.startswith("arg"):
            first.values = info.axes[next(iter(gone))] if len(gone) == 1 else None
        return first
    second = Info(axes, zero, active=info.active)
    if call.name in {"max", "min", "median"} and len(gone) == 1:
        second.values = info.axes[next(iter(gone))]
    return [first, second]


@rule("_softmax", "softmax", "_log_softmax", "log_softmax", "_safe_softmax")
def softmax(call: Call) -> Info:
    info = call.info("self")
    dim = call["dim"] % len(info.axes)
    ax.mark(info.axes[dim], "size")
    for contracted, batch in info.scores:
        ax.mark(contracted, "qk")
        for axis in batch:
            ax.mark(axis, "heads")
    return Info(info.axes, (False,) * len(info.axes), active=info.active, attention=bool(info.scores))


def _affine(call: Call, info: Info, first: int) -> Info:
    """The result of a normalisation over dimensions ``first:`` with elementwise weight and bias over them."""
    zero = list(info.zero)
    for d in range(first, len(info.axes)):
        ax.mark(info.axes[d], "size")
        zero[d] = zero[d] and "rms" in call.name
    for name in ("weight", "bias"):
        if call.get(name) is not None:
            param = call.info(name)
            for d, axis in enumerate(param.axes):
                call.unify(info.axes[first + d], axis)
                zero[first + d] = (zero[first + d] or name == "weight") and param.zero[d]
    if call.get("bias") is not None:
        zero[:first] = [False] * first
    return Info(info.axes, tuple(zero), active=info.active)


@rule("native_layer_norm", "layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(call: Call) -> Info | list[Info]:
    info = call.info("input")
    first = len(info.axes) - len(call["normalized_shape"])
    out = _affine(call, info, first)
    if not isinstance(call.out, (list, tuple)):
        return out
    rest = []
    for t in call.out[1:]:
        axes = tuple(info.axes[d] if d < first and t.shape[d] != 1 else ax.ONE for d in range(t.dim()))
        rest.append(Info(axes, (False,) * len(axes), active=info.active))
    return [out, *rest]


@rule("native_group_norm")
def group_norm(call: Call) -> list[Info]:
    info = call.info("input")
    groups, per_group = ax.divide(info.axes[1], info.axes[1].size // call["group"])
    ax.mark(per_group, "size")
    if groups.size > 1:
        call.freeze(groups, "normalised in groups")
    zero = [False] * len(info.axes)
    for name in ("weight", "bias"):
        if call.get(name) is not None:
            call.unify(info.axes[1], call.info(name).axes[0])
            zero[1] = True
    axes = (info.axes[0], groups)
    side = [Info(axes, (False, False), active=info.active) for _ in call.out[1:]]
    return [Info(info.axes, tuple(zero), active=info.active), *side]


@rule("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "_batch_norm_no_update")
def batch_norm(call: Call) -> list[Info]:
    info = call.info("input")
    for name in ("weight", "bias", "running_mean", "running_var"):
        if call.get(name) is not None:
            call.unify(info.axes[1], call.info(name).axes[0])
    zero = [False] * len(info.axes)
    zero[1] = call.get("weight") is not None
    side = []
    for t in call.out[1:]:
        axes = (info.axes[1],) if tuple(t.shape) == (info.axes[1].size,) else tuple(call.fresh(n) for n in t.shape)
        side.append(Info(axes, (False,) * len(axes)))
    return [Info(info.axes, tuple(zero), active=info.active), *side]


@rule("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp")
def scan(call: Call) -> Info | list[Info]:
    info = call.info("self")
    dim = call["dim"] % len(info.axes) if info.axes else 0
    if info.axes:
        if call.name.startswith("cumsum") and info.zero[dim]:
            ax.mark(info.axes[dim], "ordered")
        else:
            ax.mark(info.axes[dim], "size")
    zero = tuple(z and d != dim and call.name.startswith("cumsum") for d, z in enumerate(info.zero))
    out = Info(info.axes, zero, active=info.active)
    return [out, Info(info.axes, zero)] if isinstance(call.out, (list, tuple)) else out
