"""Ops that address by value: an axis indexed by values is frozen, unless the values are known to point into it."""

from __future__ import annotations

import torch

from pyprune.discovery import axes as ax
from pyprune.discovery.rules import rule
from pyprune.discovery.rules.elementwise import broadcast
from pyprune.discovery.tracer import Call, Info


def _addressed(call: Call, axis: ax.Axis, index: Info) -> bool:
    """``axis`` is addressed by ``index``: harmless (True) when its values came from positions of that very axis."""
    pointed = None if index.values is None else pointed_part(index.values, axis.size)
    if pointed is None:
        call.freeze(axis, "looked up by value")
        return False
    call.unify(axis, pointed)
    ax.mark(axis, "routed")
    return True


def pointed_part(pointed: ax.Axis, size: int) -> ax.Axis | None:
    """The axis of ``size`` indices that pointers into ``pointed`` mean: itself, or all of it but one last sentinel."""
    if pointed.size == size:
        return pointed
    body = ax.without_sentinel(pointed)
    return body if body.size == size else None


@rule("embedding")
def embedding(call: Call) -> Info:
    weight, index = call.info("weight"), call.info("indices")
    ax.mark(weight.axes[0], "lookup")
    call.freeze(weight.axes[0], "looked up by value")
    call.tracer.use(weight, 0, "lookup")
    # Tables addressed by the input's values carry the residual stream; those of constants (positions) join it later.
    if index.active:
        ax.mark(weight.axes[1], "embedded")
    return Info((*index.axes, weight.axes[1]), (*(False for _ in index.axes), weight.zero[1]), active=index.active)


def _one_known(call: Call, axis: ax.Axis, index: torch.Tensor) -> bool:
    """``index`` is one position written in the code, and nothing lies between it and the end that it counts from."""
    if index.numel() != 1 or not call.info(index).made or getattr(index, "constant", index) is None:
        return False
    position = int(index.item())
    start = position % axis.size
    try:
        ax.take(axis, start, start + 1)
        if position >= 0:
            return start == 0 or not ax.atoms(ax.take(axis, 0, start))
        return start + 1 == axis.size or not ax.atoms(ax.take(axis, start + 1, axis.size))
    except ax.Mismatch:
        return False


@rule("index", "_unsafe_index")
def index_tensors(call: Call) -> Info | None:
    info, indices = call.info("self"), list(call["indices"])
    if any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in indices):
        return _index_by_mask(call, info, indices)
    given = [d for d, t in enumerate(indices) if t is not None]
    infos = [call.info(indices[d]) for d in given]
    routed = [
        _one_known(call, info.axes[d], indices[d]) or _addressed(call, info.axes[d], index)
        for d, index in zip(given, infos, strict=True)
    ]
    rank = max(len(i.axes) for i in infos)
    kept = [d for d in range(len(info.axes)) if d not in given]
    adjacent = given == list(range(given[0], given[0] + len(given)))
    at = given[0] if adjacent else 0
    axes, _ = broadcast(call, infos, call.out.shape[at : at + rank])
    order: list[int] = [*kept[:at], *([-1] * rank), *kept[at:]]
    new = iter(axes)
    # Weights chosen by a router are still weights.
    active = info.active or not all(i or not j.active for i, j in zip(routed, infos, strict=True))
    source = info.source
    if source is not None:
        source = (source[0], tuple(source[1][o] if o >= 0 else -1 for o in order))
    return Info(tuple(info.axes[o] if o >= 0 else next(new) for o in order),
                tuple(o >= 0 and info.zero[o] for o in order), active=active, source=source,
                values=info.values)  # fmt: skip


def _index_by_mask(call: Call, info: Info, indices: list[torch.Tensor | None]) -> Info | None:
    """``x[mask]`` with one mask: its dimensions become one axis of unknown length."""
    if len(indices) != 1 or indices[0] is None:
        return None
    mask = call.info(indices[0])
    rank = len(mask.axes)
    for a, b in zip(info.axes[:rank], mask.axes, strict=True):
        call.unify(a, b)
        call.freeze(a, "chosen by a mask")
    picked = call.fresh(call.out.shape[0], "chosen by a mask")
    ax.mark(picked, "chosen")
    return Info((picked, *info.axes[rank:]), (False, *info.zero[rank:]), active=True)


@rule("index_select")
def index_select(call: Call) -> Info:
    info, index = call.info("self"), call.info("index")
    dim = call["dim"] % len(info.axes)
    _addressed(call, info.axes[dim], index)
    axes, zero = list(info.axes), list(info.zero)
    axes[dim], zero[dim] = index.axes[0] if index.axes else ax.ONE, False
    return Info(tuple(axes), tuple(zero), active=info.active or index.active, values=info.values)


@rule("gather")
def gather(call: Call) -> Info:
    info, index = call.info("self"), call.info("index")
    dim = call["dim"] % len(info.axes)
    _addressed(call, info.axes[dim], index)
    zero = []
    for d, axis in enumerate(index.axes):
        same = d != dim and axis.size == info.axes[d].size
        if same:
            call.unify(axis, info.axes[d])
        elif d != dim:
            call.freeze(info.axes[d], "gathered in part")
        zero.append(same and info.zero[d])
    return Info(index.axes, tuple(zero), active=info.active or index.active, values=info.values)


@rule("scatter", "scatter_add", "scatter_reduce")
def scatter(call: Call) -> Info:
    info, index = call.info("self"), call.info("index")
    dim = call["dim"] % len(info.axes)
    _addressed(call, info.axes[dim], index)
    src = call.info("src") if isinstance(call.get("src"), torch.Tensor) else None
    for d, axis in enumerate(index.axes):
        if d != dim and axis.size == info.axes[d].size:
            call.unify(axis, info.axes[d])
        elif d != dim:
            call.freeze(info.axes[d], "scattered in part")
        if src is not None and src.axes[d].size == axis.size:
            call.unify(axis, src.axes[d])
        elif src is not None:
            call.freeze(src.axes[d], "scattered in part")
    active = info.active or index.active or (src is not None and src.active)
    zero = tuple(z and d != dim and (src is None or src.zero[d]) for d, z in enumerate(info.zero))
    return Info(info.axes, zero, active=active)


@rule("index_add", "index_copy")
def index_add(call: Call) -> Info:
    info, index, src = call.info("self"), call.info("index"), call.info("source")
    dim = call["dim"] % len(info.axes)
    _addressed(call, info.axes[dim], index)
    for d in range(len(info.axes)):
        call.unify(src.axes[d], info.axes[d] if d != dim else index.axes[0])
    zero = tuple(z and d != dim and src.zero[d] for d, z in enumerate(info.zero))
    return Info(info.axes, zero, active=info.active or src.active)


@rule("topk", "sort", "kthvalue")
def ranked(call: Call) -> list[Info]:
    info = call.info("self")
    dim = call["dim"] % len(info.axes)
    axis = info.axes[dim]
    ax.mark(axis, "size")
    ax.mark(axis, "ranked")
    if call.name == "sort":
        call.freeze(axis, "sorted")
    elif call.name == "topk":
        call.tracer.ranked.append((axis, call["k"]))
    axes = list(info.axes)
    axes[dim] = call.fresh(call.out[0].shape[dim], "ranked")
    zero = tuple(z and d != dim for d, z in enumerate(info.zero))
    return [Info(tuple(axes), zero, active=info.active, values=info.values),
            Info(tuple(axes), (False,) * len(axes), active=info.active, values=axis)]  # fmt: skip


@rule("one_hot")
def one_hot(call: Call) -> Info:
    index = call.info("self")
    size = call.out.shape[-1]
    if index.values is not None and index.values.size in (size, size - 1):
        # Mixtures with an extra class for "no expert here" keep it last.
        axis = ax.concat([index.values, call.fresh(size - index.values.size)])
        ax.mark(axis, "routed")
    else:
        axis = call.fresh(size, "made by value")
    return Info((*index.axes, axis), (False,) * call.out.dim(), active=index.active)


@rule("nonzero")
def nonzero(call: Call) -> Info:
    """Positions of one axis: the results point into it. Of several: they are addressed by value."""
    info = call.info("self")
    # Only a mask that depends on the data: with a constant one, sizes further on depend on how many there are.
    pointed = info.axes[0] if len(info.axes) == 1 and info.active else None
    for axis in () if pointed is not None else info.axes:
        call.freeze(axis, "addressed by value")
    found = call.fresh(call.out.shape[0], "addressed by value")
    ax.mark(found, "chosen")
    return Info((found, call.fresh(call.out.shape[1])), (False, False), active=info.active, values=pointed)


@rule("unique2", "_unique2", "searchsorted", "bucketize")
def by_value(call: Call) -> list[Info]:
    infos = [call.info(t) for t in call.tensors]
    for info in infos:
        for axis in info.axes:
            call.freeze(axis, "addressed by value")
    results = call.out if isinstance(call.out, (list, tuple)) else [call.out]
    active = any(i.active for i in infos)
    return [Info(tuple(call.fresh(n, "addressed by value") for n in t.shape), (False,) * t.dim(), active=active)
            for t in results]  # fmt: skip
