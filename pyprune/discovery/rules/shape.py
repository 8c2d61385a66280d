"""Ops that rearrange: views refine axes into products, slices and concatenations into segments."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pyprune.discovery import axes as ax
from pyprune.discovery.axes import Axis, Mismatch
from pyprune.discovery.rules import rule
from pyprune.discovery.tracer import Call, Info


def relabel(
    info: Info, axes: Sequence[Axis], origin: Sequence[int], zero: Sequence[bool] | None = None, view: bool = True
) -> Info:
    """Info of the same values under other dimensions; ``origin[d]`` is ``d``'s dimension in ``info``, or -1."""
    if zero is None:
        zero = [o >= 0 and info.zero[o] for o in origin]
    source = info.source
    if source is not None:
        source = (source[0], tuple(source[1][o] if o >= 0 else -1 for o in origin))
    return Info(
        tuple(axes), tuple(zero), active=info.active, source=source, root=(info.root or info) if view else None,
        scores=info.scores, attention=info.attention, values=info.values, skips=info.skips,
    )  # fmt: skip


def _permuted(info: Info, order: Sequence[int]) -> Info:
    return relabel(info, [info.axes[o] for o in order], order)


@rule("t", "numpy_T", "mT", "adjoint")
def transpose_last(call: Call) -> Info:
    info = call.info("self")
    rank = len(info.axes)
    return _permuted(info, [*range(rank - 2), rank - 1, rank - 2] if rank >= 2 else range(rank))


@rule("transpose", "swapaxes")
def transpose(call: Call) -> Info:
    info = call.info("self")
    rank = len(info.axes)
    order = list(range(rank))
    i, j = call.args.get("dim0", call.get("axis0")) % rank, call.args.get("dim1", call.get("axis1")) % rank
    order[i], order[j] = order[j], order[i]
    return _permuted(info, order)


@rule("permute")
def permute(call: Call) -> Info:
    info = call.info("self")
    return _permuted(info, [d % len(info.axes) for d in call["dims"]])


@rule("unsqueeze")
def unsqueeze(call: Call) -> Info:
    info = call.info("self")
    order = list(range(len(info.axes)))
    order.insert(call["dim"] % (len(order) + 1), -1)
    return relabel(info, [info.axes[o] if o >= 0 else ax.ONE for o in order], order)


@rule("squeeze")
def squeeze(call: Call) -> Info:
    info = call.info("self")
    gone = set(call.dims("dim", len(info.axes)))
    return _permuted(info, [d for d in range(len(info.axes)) if d not in gone or info.axes[d].size != 1])


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten", "view_copy", "reshape_copy")
def view(call: Call) -> Info:
    info = call.info("self")
    axes, origin, zero = reshaped(call, info, tuple(call.out.shape))
    return relabel(info, axes, origin, zero)


def reshaped(call: Call, info: Info, shape: tuple[int, ...]) -> tuple[list[Axis], list[int], list[bool]]:
    """Axes, origins and zero flags after a row-major reshape.

    Dimensions of size one apart, the smallest runs of equal product on both sides correspond; within a run, inputs are
    refined into factors and outputs are products of them.
    """
    axes: list[Axis] = [ax.ONE] * len(shape)
    origin, zero = [-1] * len(shape), [False] * len(shape)
    ins = [d for d in range(len(info.axes)) if info.axes[d].size > 1]
    outs = [d for d in range(len(shape)) if shape[d] > 1]
    if 0 in shape and math.prod(shape[d] for d in outs) != math.prod(info.axes[d].size for d in ins):
        for axis in info.axes:
            call.freeze(axis, "reshaped without data")
        return [call.fresh(n, "reshaped without data") for n in shape], origin, zero
    i = j = 0
    while i < len(ins) and j < len(outs):
        i0, j0, left, right = i, j, info.axes[ins[i]].size, shape[outs[j]]
        while left != right:
            if left < right:
                i += 1
                left *= info.axes[ins[i]].size
            else:
                j += 1
                right *= shape[outs[j]]
        i, j = i + 1, j + 1
        block_in, block_out = ins[i0:i], outs[j0:j]
        if len(block_in) == len(block_out) == 1:
            axes[block_out[0]], origin[block_out[0]] = info.axes[block_in[0]], block_in[0]
            zero[block_out[0]] = info.zero[block_in[0]]
            continue
        whole = ax.product([info.axes[d] for d in block_in])
        # A masked unit of a split or merged axis is zero only where every part says so.
        flag = all(info.zero[d] for d in block_in)
        some = any(info.zero[d] for d in block_in)
        try:
            rest = whole
            for n, d in enumerate(block_out):
                inner = 1
                for later in block_out[n + 1 :]:
                    inner *= shape[later]
                axes[d], rest = ax.divide(rest, inner)
        except Mismatch as error:
            call.freeze(whole, f"reshaped across its structure ({error})")
            for d in block_out:
                axes[d] = call.fresh(shape[d], "reshaped across its structure")
            continue
        if flag:
            for d in block_out:
                zero[d] = True
        elif some:
            flags = {id(a): info.zero[d] for d in block_in for a in ax.atoms(info.axes[d])}
            for d in block_out:
                zero[d] = all(flags.get(id(a), False) for a in ax.atoms(axes[d]))
    for d in range(len(shape)):
        if shape[d] == 0:
            axes[d] = ax.atom(0)
    return axes, origin, zero


@rule("expand", "broadcast_to", "expand_copy")
def expand(call: Call) -> Info:
    info = call.info("self")
    shape = call.out.shape
    offset = len(shape) - len(info.axes)
    axes, origin = [], []
    for d, size in enumerate(shape):
        own = d - offset
        same = own >= 0 and info.axes[own].size == size
        axes.append(info.axes[own] if same else call.fresh(size))
        origin.append(own if same else -1)
    return relabel(info, axes, origin)


@rule("repeat")
def repeat(call: Call) -> Info:
    info = call.info("self")
    offset = len(call["repeats"]) - len(info.axes)
    axes, origin = [], []
    for d, times in enumerate(call["repeats"]):
        own = d - offset
        axis = info.axes[own] if own >= 0 else ax.ONE
        axes.append(axis if times == 1 else ax.product([call.fresh(times), axis]))
        origin.append(own if own >= 0 and axis.size != 1 else -1)
    return relabel(info, axes, origin, view=False)


@rule("repeat_interleave")
def repeat_interleave(call: Call) -> Info | None:
    info, times = call.info("self"), call.get("repeats")
    if not isinstance(times, int) or call.get("dim") is None:
        return None
    dim = call["dim"] % len(info.axes)
    axes = list(info.axes)
    axes[dim] = ax.product([axes[dim], call.fresh(times)])
    return relabel(info, axes, range(len(axes)), view=False)


_OF_WEIGHTS = frozenset({"produced", "contracted", "embedded", "lookup"})


def _with_axis(info: Info, dim: int, axis: Axis) -> Info:
    axes = list(info.axes)
    # A segment is not the parameter's dimension any more, but it is still produced or contracted as that dimension.
    axes[dim] = axis
    return relabel(info, axes, range(len(axes)))


@rule("slice", "narrow")
def slice_(call: Call) -> Info:
    info, dim = call.info("self"), call["dim"] % len(call.info("self").axes)
    axis, size = info.axes[dim], call.out.shape[dim]
    if call.name == "narrow":
        start, step = call["start"], 1
    else:
        start, step = call.get("start") or 0, call.get("step", 1)
    start = max(start + axis.size, 0) if start < 0 else start
    if size == axis.size:
        return _with_axis(info, dim, axis)
    if size == 0:
        _emptied(call, info, dim)
        return _with_axis(info, dim, ax.atom(0))
    if size == 1:
        return _one_index(call, info, dim, start)
    try:
        if step == 1:
            return _with_axis(info, dim, ax.take(axis, start, start + size))
        if axis.size % step == 0 and size == axis.size // step:
            outer, inner = ax.divide(axis, step)
            call.freeze(inner, "sliced with a step")
            return _with_axis(info, dim, outer)
        raise Mismatch(f"step {step} over {axis.size}")
    except Mismatch as error:
        call.freeze(axis, f"sliced across its structure ({error})")
        return _with_axis(info, dim, call.fresh(size, "sliced across its structure"))


def _emptied(call: Call, info: Info, dim: int) -> None:
    """A slice that holds nothing. Of a weight's dimension (no channel left unrotated) that says nothing; of the data's,
    the code that follows would have related axes on longer inputs, and does not now."""
    if info.active and not any(a.marks & _OF_WEIGHTS for a in ax.atoms(info.axes[dim])):
        for d, axis in enumerate(info.axes):
            if d != dim:
                call.freeze(axis, "left without data (the inputs are too short)")


def _one_index(call: Call, info: Info, dim: int, start: int) -> Info:
    try:
        return _with_axis(info, dim, ax.take(info.axes[dim], start, start + 1))
    except Mismatch:
        call.freeze(info.axes[dim], "one index taken")
        return _with_axis(info, dim, ax.ONE)


@rule("select")
def select(call: Call) -> Info:
    info = call.info("self")
    dim = call["dim"] % len(info.axes)
    call.freeze(info.axes[dim], "one index selected")
    order = [d for d in range(len(info.axes)) if d != dim]
    return _permuted(info, order)


@rule("unbind")
def unbind(call: Call) -> list[Info]:
    info = call.info("self")
    dim = call["dim"] % len(info.axes)
    call.freeze(info.axes[dim], "one index selected")
    return [_permuted(info, [d for d in range(len(info.axes)) if d != dim]) for _ in call.out]


@rule("split", "split_with_sizes", "chunk", "tensor_split", "split_copy", "split_with_sizes_copy", "unsafe_split")
def split(call: Call) -> list[Info]:
    info = call.info("self")
    dim = call["dim"] % len(info.axes)
    out, start = [], 0
    for piece in call.out:
        size = piece.shape[dim]
        try:
            axis = ax.take(info.axes[dim], start, start + size) if size else ax.atom(0)
        except Mismatch as error:
            call.freeze(info.axes[dim], f"split across its structure ({error})")
            axis = call.fresh(size, "split across its structure")
        out.append(_with_axis(info, dim, axis))
        start += size
    return out


@rule("cat", "concat")
def cat(call: Call) -> Info:
    infos = [i for t in call["tensors"] if (i := call.info(t)) and not (len(i.axes) == 1 and i.axes[0].size == 0)]
    rank = call.out.dim()
    dim = call["dim"] % rank
    axes, zero = list(infos[0].axes), list(infos[0].zero)
    for info in infos[1:]:
        for d in range(rank):
            if d != dim:
                call.unify(axes[d], info.axes[d])
            zero[d] = zero[d] and info.zero[d]
    axes[dim] = ax.concat([i.axes[dim] for i in infos])
    return Info(
        tuple(axes), tuple(zero), active=any(i.active for i in infos), scores=tuple(s for i in infos for s in i.scores),
        attention=any(i.attention for i in infos), values=_pointed(infos),
    )  # fmt: skip


def _pointed(infos: list[Info]) -> Axis | None:
    """The axis that the values of all of them point into."""
    first = infos[0].values
    same = first is not None and all(i.values is not None and ax.find(i.values) is ax.find(first) for i in infos)
    return first if same else None


@rule("stack")
def stack(call: Call) -> Info:
    infos = [call.info(t) for t in call["tensors"]]
    dim = call["dim"] % call.out.dim()
    axes, zero = list(infos[0].axes), list(infos[0].zero)
    for info in infos[1:]:
        for d in range(len(axes)):
            call.unify(axes[d], info.axes[d])
            zero[d] = zero[d] and info.zero[d]
    axes.insert(dim, call.fresh(len(infos), "stacked"))
    zero.insert(dim, False)
    return Info(tuple(axes), tuple(zero), active=any(i.active for i in infos), values=_pointed(infos))


@rule("constant_pad_nd", "pad")
def pad(call: Call) -> Info:
    info = call.info("self")
    axes, widths = list(info.axes), call["pad"]
    zero = list(info.zero)
    for k in range(len(widths) // 2):
        dim, before, after = len(axes) - 1 - k, widths[2 * k], widths[2 * k + 1]
        axis = axes[dim]
        try:
            if before < 0 or after < 0:
                axis = ax.take(axis, max(-before, 0), axis.size + min(after, 0))
            parts = [call.fresh(max(before, 0), "padding"), axis, call.fresh(max(after, 0), "padding")]
            axes[dim] = ax.concat(parts)
        except Mismatch as error:
            call.freeze(axis, f"cropped across its structure ({error})")
            axes[dim] = call.fresh(call.out.shape[dim], "cropped across its structure")
    if call.get("value"):
        zero = [False] * len(zero)
    return Info(tuple(axes), tuple(zero), active=info.active)


@rule("flip", "roll", "rot90")
def reorder(call: Call) -> Info:
    info = call.info("self")
    for d in call.dims("dims", len(info.axes)):
        call.freeze(info.axes[d], "reordered")
    return relabel(info, info.axes, range(len(info.axes)), view=False)


@rule("unfold")
def unfold(call: Call) -> Info:
    info = call.info("self")
    dim = call["dimension"] % len(info.axes)
    call.freeze(info.axes[dim], "unfolded into windows")
    axes, origin = list(info.axes), list(range(len(info.axes)))
    axes[dim], origin[dim] = call.fresh(call.out.shape[dim], "windows"), -1
    return relabel(info, [*axes, call.fresh(call["size"], "window")], [*origin, -1])


@rule("diagonal", "tril", "triu")
def triangle(call: Call) -> Info | None:
    info = call.info("self")
    if call.name == "diagonal":
        return None
    for d in (-1, -2):
        call.freeze(info.axes[d], "compared by position")
    return Info(info.axes, (*info.zero[:-2], False, False), active=info.active)
