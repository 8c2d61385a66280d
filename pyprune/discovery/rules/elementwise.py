"""Elementwise ops: equal dimensions are one axis, a dimension of size one takes the other's."""

from __future__ import annotations

import math

import torch

from pyprune.discovery import axes as ax
from pyprune.discovery.rules import rule
from pyprune.discovery.tracer import Call, Info

# f(0) = 0, so a masked unit stays zero.
ZERO_PRESERVING = frozenset(
    "neg abs sqrt square sign sgn sin tan tanh asin atan sinh asinh erf expm1 log1p relu relu6 silu gelu elu selu celu "
    "leaky_relu mish hardswish hardshrink softshrink softsign trunc floor ceil round positive clone _to_copy "
    "alias detach lift_fresh conj conj_physical real prelu _prelu_kernel".split()
)
ACTIVATIONS = frozenset(
    "relu relu6 silu gelu elu selu celu leaky_relu mish hardswish hardtanh hardsigmoid sigmoid tanh softplus erf prelu "
    "_prelu_kernel log_sigmoid_forward threshold".split()
)
# The same numbers again: residual paths and pointers survive them.
_COPIES = frozenset("clone _to_copy alias detach lift_fresh positive contiguous".split())
_ALIASES = frozenset("alias detach lift_fresh".split())
_CLAMPS = frozenset("clamp clamp_min clamp_max hardtanh".split())


def broadcast(call: Call, infos: list[Info], shape: torch.Size) -> tuple[tuple[ax.Axis, ...], list[list[int]]]:
    """Axes of the broadcast of ``infos`` to ``shape``, unified, and for each dimension the operands that carry it."""
    axes, carriers = [], []
    for dim in range(len(shape)):
        axis = ax.ONE
        who: list[int] = []
        made = False
        if shape[dim] != 1:
            for i, info in enumerate(infos):
                own = dim - (len(shape) - len(info.axes))
                if own < 0 or info.axes[own].size == 1:
                    continue
                if not who:
                    axis = info.axes[own]
                    made = info.made
                elif info.axes[own] is not axis:
                    call.join(axis, info, own, made)
                    if made and not info.made:
                        axis, made = info.axes[own], False
                who.append(i)
            if not who:
                axis = call.fresh(shape[dim])
        axes.append(axis)
        carriers.append(who)
    return tuple(axes), carriers


def _bounds(call: Call) -> tuple[float, float]:
    """Those of a clamp by two numbers."""
    low, high = call.get("min", call.get("min_val")), call.get("max", call.get("max_val"))
    return -math.inf if low is None else low, math.inf if high is None else high


def _zeros(call: Call, infos: list[Info], rank: int, carriers: list[list[int]]) -> tuple[bool, ...]:
    """For each dimension: is the result zero where the operands' masked units are?"""
    name = call.name.removesuffix("_")

    def at(i: int, dim: int) -> bool:
        return i in carriers[dim] and infos[i].zero[dim - (rank - len(infos[i].axes))]

    def constant(*names: str) -> bool:
        # A Python number among the arguments that is added to, or stands in for, the tensor's values.
        return any(isinstance(call.get(n), (int, float)) and call.get(n) != 0 for n in names)

    dims = range(rank)
    if name in ZERO_PRESERVING or name in {"bitwise_and", "logical_and"}:
        return tuple(at(0, d) for d in dims)
    if name in {"div", "true_divide"}:
        # 0 / 0 is not zero.
        return tuple(at(0, d) and not (len(infos) > 1 and at(1, d)) for d in dims)
    if name == "nan_to_num" and not constant("nan"):
        return tuple(at(0, d) for d in dims)
    if name == "mul":
        return tuple(any(at(i, d) for i in range(len(infos))) for d in dims)
    if name in {"add", "sub", "maximum", "minimum"} and not constant("other"):
        return tuple(all(at(i, d) for i in range(len(infos))) for d in dims)
    if name == "pow" and isinstance(call.get("exponent"), (int, float)) and call["exponent"] > 0:
        return tuple(at(0, d) for d in dims)
    if name in _CLAMPS and len(infos) == 1:
        low, high = _bounds(call)
        return tuple(low <= 0 <= high and at(0, d) for d in dims)
    if name == "where" and len(infos) == 3:
        return tuple(at(1, d) and at(2, d) for d in dims)
    if name == "masked_fill" and not constant("value") and len(infos) == 2:
        return tuple(at(0, d) for d in dims)
    if name in {"addcmul", "addcdiv"}:
        if name == "addcdiv":
            return tuple(at(0, d) and at(1, d) and not at(2, d) for d in dims)
        return tuple(at(0, d) and (at(1, d) or at(2, d)) for d in dims)
    return (False,) * rank


def _clamps_nothing(call: Call, name: str, info: Info) -> bool:
    """Is this a clamp of numbers that point into an axis, with bounds that none of them reaches past?"""
    if name not in _CLAMPS or len(call.tensors) > 1 or info.values is None:
        return False
    low, high = _bounds(call)
    alone = ax.without_sentinel(info.values) is ax.find(info.values)  # or "none of these" would become one of them
    return alone and low <= 0 and high >= info.values.size - 1


@rule("pointwise", "clone", "_to_copy", "alias", "detach", "lift_fresh", "where", "masked_fill", "nan_to_num",
      "_prelu_kernel", "log_sigmoid_forward", "bernoulli", "contiguous")  # fmt: skip
def elementwise(call: Call) -> Info | list[Info]:
    tensors = call.tensors
    infos = [call.info(t) for t in tensors]
    out = call.out if isinstance(call.out, torch.Tensor) else call.out[0]
    axes, carriers = broadcast(call, infos, out.shape)
    name = call.name.removesuffix("_")
    if name in ACTIVATIONS:
        for axis in axes:
            ax.mark(axis, "activation")
    elif name == "mul" and len(infos) == 2 and infos[0].active and infos[1].active:
        for axis, who in zip(axes, carriers, strict=True):
            if len(who) == 2:
                ax.mark(axis, "gate")
    elif name in {"mul", "div"} and infos[0].active and isinstance(call.get("other"), float):
        for axis in axes:
            if axis.size > 1 and math.isclose(abs(math.log(abs(call["other"]) or 1)), 0.5 * math.log(axis.size)):
                ax.mark(axis, "scaled")
    skips: frozenset[int] = frozenset()
    if name in _COPIES:
        skips = infos[0].skips
    elif name == "add" and call.get("alpha", 1) == 1:
        skips = frozenset().union(*(i.skips for i in infos))
    info = Info(
        axes,
        _zeros(call, infos, out.dim(), carriers),
        active=any(i.active for i in infos),
        source=infos[0].source if name in _COPIES else None,
        root=(infos[0].root or infos[0]) if name in _ALIASES else None,
        scores=tuple({id(s): s for i in infos for s in i.scores}.values()),
        attention=any(i.attention for i in infos),
        values=infos[0].values if name in _COPIES or _clamps_nothing(call, name, infos[0]) else None,
        skips=skips,
    )
    if isinstance(call.out, torch.Tensor):
        return info
    return [info] + [Info(tuple(call.fresh(n, "unused result") for n in t.shape), (False,) * t.dim())
                     for t in call.out[1:]]  # fmt: skip


@rule("copy", "fill", "zero", "native_dropout")
def overwrite(call: Call) -> Info | list[Info]:
    target = call.info("self" if "self" in call.args else "input")
    if call.name.startswith(("fill", "zero")):
        return Info(target.axes, (call.name.startswith("zero"),) * len(target.axes))
    if call.name == "native_dropout":
        return [Info(target.axes, target.zero, active=target.active, skips=target.skips)] * 2
    source = call.info("src")
    shape = torch.Size([a.size for a in target.axes])
    axes, carriers = broadcast(call, [target, source], shape)
    offset = len(shape) - len(source.axes)
    zero = tuple(1 in carriers[d] and source.zero[d - offset] for d in range(len(shape)))
    return Info(axes, zero, active=source.active, scores=source.scores, values=source.values,
                attention=source.attention)  # fmt: skip
